// The launchers of the depthwise kernels with the memory of a CPU, for ctypes.
#include "inverted_bottleneck_bwd.cu"
#include "inverted_bottleneck_fwd.cu"

using namespace fusekern::dw;

extern "C" {

void reverse(int reversed) { cuda_on_host::reversed = reversed; }

int launches() { return cuda_on_host::launches; }

// type: 0 float32, 1 bfloat16, 2 float16.
int parts(int backward, int type, int last, int K, int stride, int B, int E, int H, int W, int h, int w) {
  const Problem problem{Type(type), bool(last), K, stride, B, E, H, W, h, w};
  return backward ? backward_parts(problem) : forward_parts(problem);
}

const char* forward(int type, int last, int K, int stride, int B, int E, int H, int W, int h, int w, const void* y1,
                    const float* affine, const void* weight, void* y2, float* partial, float* stats, int narrow,
                    const void* norm_weight, const void* norm_bias, float eps, float* vectors, int* arrived,
                    const float* partial1, int parts1, int size1, int pixels1, const void* weight1, const void* bias1,
                    float eps1, float* vectors1) {
  const Problem problem{Type(type), bool(last), K, stride, B, E, H, W, h, w};
  const Type of = narrow ? Type(type) : Type::float32;
  const NormForward norm{{norm_weight, of}, {norm_bias, of}, eps, vectors};
  const Before before{partial1, parts1, size1, pixels1, {{weight1, of}, {bias1, of}, eps1, vectors1}};
  return launch(problem, Forward{y1, affine, weight, y2, partial, stats, norm, arrived, before}, nullptr);
}

const char* backward(int type, int last, int K, int stride, int B, int E, int H, int W, int h, int w, const void* dz,
                     const void* y2, const float* coef, const void* y1, const float* affine, const float* mean,
                     const void* weight, void* d, void* dweight, float* partial, float* sums, int narrow,
                     const float* vectors, const void* norm_weight, float eps, int batch, float* coef1,
                     void* norm_dweight, void* norm_dbias, int* arrived) {
  const Problem problem{Type(type), bool(last), K, stride, B, E, H, W, h, w};
  const Type of = narrow ? Type(type) : Type::float32;
  const NormBackward norm{vectors, {norm_weight, of}, eps, bool(batch), coef1, {norm_dweight, of}, {norm_dbias, of}};
  return launch(problem, Backward{dz, y2, coef, y1, affine, mean, weight, d, dweight, partial, sums, norm, arrived},
                nullptr);
}

}  // extern "C"
