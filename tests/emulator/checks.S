# What tests/emulator/checks.py has the emulated CPU execute.
    .section .note.GNU-stack, "", @progbits
    .text
    .globl copy_masked, dot_second, invalid, recurse

copy_masked:  # (float *to, const float *from, unsigned mask)
    kmovw   %edx, %k1
    vmovups (%rsi), %zmm0{%k1}{z}
    vmovups %zmm0, (%rdi){%k1}
    ret

dot_second:  # (float to[16], const bf16 from[2][32]): products of the two rows, summed by pairs
    vmovups   (%rsi), %zmm1
    vpxord    %zmm0, %zmm0, %zmm0
    vdpbf16ps 64(%rsi), %zmm1, %zmm0
    vmovups   %zmm0, (%rdi)
    ret

invalid:
    ud2

recurse:
    push %rax
    jmp  recurse
