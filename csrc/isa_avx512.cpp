// The bodies of all ops for CPUs with AVX-512 F, BW, VL and DQ.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#define FUSEKERN_ISA avx512

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
