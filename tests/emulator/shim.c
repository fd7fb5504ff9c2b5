// What bochscpu needs of its process. Loaded with its symbols global, before bochscpu is imported.
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

// Its wheel was linked against glibc 2.38; older ones lack these two names.
int __isoc23_sscanf(const char *text, const char *format, ...) {
    va_list values;
    va_start(values, format);
    const int count = vsscanf(text, format, values);
    va_end(values);
    return count;
}
unsigned long long __isoc23_strtoull(const char *text, char **end, int base) {
    return strtoull(text, end, base);
}

// Bochs asks BX_CPU_C::add_remove_cpuid_features(list, add) for the features to add to its CPU model. This
// stands in front of it and asks for those of the avx512 rung. emulator.py sets `original`.
void (*original)(void *cpu, const char *features, bool add);

void _ZN8BX_CPU_C25add_remove_cpuid_featuresEPKcb(void *cpu, const char *features, bool add) {
    original(cpu, add ? "avx512bf16 avx512vnni avx512vbmi" : features, add);
}
