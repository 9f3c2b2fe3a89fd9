/* Includes SELF for each storage format at the present LEVEL; see levels.h. */
#define FORMAT f32
#define E float
#define DTYPE 0
#include "vector.h"
#include SELF
#undef FORMAT
#undef E
#undef DTYPE

#define FORMAT bf16
#define E uint16_t
#define DTYPE 1
#include "vector.h"
#include SELF
#undef FORMAT
#undef E
#undef DTYPE

#define FORMAT f16
#define E half
#define DTYPE 2
#include "vector.h"
#include SELF
#undef FORMAT
#undef E
#undef DTYPE
