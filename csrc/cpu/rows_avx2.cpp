#include "rows.h"
#if defined(NEFT_X86_KERNELS)
#pragma GCC target("avx2,f16c")
#define NEFT_NAMESPACE avx2
#define NEFT_NAME "avx2"
#define NEFT_LANES 8
#include "rows_body.h"
#endif
