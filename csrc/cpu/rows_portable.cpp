// SSE2 on x86-64, NEON on aarch64, plain loops elsewhere.
#include <torch/headeronly/util/Half.h>
#define NEFT_NAMESPACE portable
#define NEFT_NAME "portable"
#define NEFT_LANES 4
#include "rows_body.h"
