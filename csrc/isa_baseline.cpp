// The bodies of all ops for any CPU of this architecture (x86-64: SSE2).
#define FUSEKERN_ISA baseline

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
