// The bodies of all ops for CPUs with AVX2, FMA and BMI1.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,bmi")
#define FUSEKERN_ISA avx2

#include "conv2former_body.h"
#include "dot_product_body.h"
#include "former2conv_body.h"
#include "former_body.h"
#include "inverted_bottleneck_depthwise_body.h"
#include "inverted_bottleneck_pass_body.h"
#include "linear_body.h"
#include "matrix_product_body.h"
#include "score_map_body.h"
#include "sparse_product_body.h"

#endif
