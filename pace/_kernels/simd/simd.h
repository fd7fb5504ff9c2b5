// The vector language of every kernel: AVX-512 intrinsics. The avx512 rung has them from the compiler; the
// avx2 rung has the ones that are used here from pair512.h, as pairs of 256-bit registers.
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

#if RUNG_AVX512
#include "avx512.h"
#elif RUNG_AVX2
#include "pair512.h"
#else
#error "compile with -DRUNG_AVX512=1 or -DRUNG_AVX2=1"
#endif

// RUNG_NAME(rms_norm) is rms_norm_avx512 or rms_norm_avx2: one source, one exported name a rung.
#define RUNG_CONCAT_(name, rung) name##_##rung
#define RUNG_CONCAT(name, rung)  RUNG_CONCAT_(name, rung)
#define RUNG_NAME(name)          RUNG_CONCAT(name, RUNG)

// The first `count` lanes; all of them from 16 (32) on.
INLINE __mmask16 first16(size_t count) { return count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1); }
