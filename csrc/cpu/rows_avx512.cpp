#include "rows.h"
#if defined(NEFT_X86_KERNELS)
#pragma GCC target("avx512f,avx512bw,avx2,f16c,prefer-vector-width=512")
#define NEFT_NAMESPACE avx512
#define NEFT_NAME "avx512"
#define NEFT_LANES 16
#include "rows_body.h"
#endif
