/* NEON as `neon.c` has it, and BF16: Arm since 2021 (Neoverse V1, N2), Apple since M2. */
#define UNIT neonbf16
#include "neon.c"
