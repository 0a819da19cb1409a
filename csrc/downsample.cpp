// downsample: the 3x3 convolution with stride 3 as a matrix product. A patch of 9 C numbers becomes one row, in the
// order in which the weight lies. The rows take as much memory as the image.
#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "arguments.h"
#include "linear.h"

namespace fusekern {

namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;

struct Downsample {
  int64_t B, C, H, W, h, w;
  bool bf16;
  Map image;
  bool channels_first;  // a row is [C][3][3], as a contiguous weight is; else [3][3][C]

  int64_t patches() const { return B * h * w; }
};

// Is a weight [C][3][3][C] in memory?
bool lies_channels_last(const Tensor& weight) {
  const int64_t C = weight.size(0);
  return C > 1 && weight.stride(0) == 9 * C && weight.stride(1) == 1 && weight.stride(2) == 3 * C &&
         weight.stride(3) == C;
}

Downsample arguments(const Tensor& image, const Tensor& weight, const Tensor& tokens) {
  STD_TORCH_CHECK(image.dim() == 4 && tokens.dim() == 4, "image and out must be [B, C, H, W]");
  const int64_t B = image.size(0), C = image.size(1);
  const ScalarType dtype = image.scalar_type();
  check("image", image, {B, C, image.size(2), image.size(3)}, dtype);
  check("weight", weight, {C, C, 3, 3}, dtype);
  check("out", tokens, {B, C, tokens.size(2), tokens.size(3)}, dtype);
  return {B, C, image.size(2), image.size(3), tokens.size(2), tokens.size(3), is_bf16(image), map_of(image),
          !lies_channels_last(weight)};
}

// ---- matrices ----------------------------------------------------------------------------------------------------

Tensor empty(const Tensor& like, int64_t rows, int64_t columns) {
  const int64_t shape[] = {rows, columns};
  return torch::stable::new_empty(like, {shape, 2});
}

// Borrowed memory with other strides.
Tensor view(const Tensor& memory, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides) {
  return torch::stable::from_blob(memory.data_ptr(), shape, strides, memory.device(), memory.scalar_type());
}

// [C, 9 C], a patch a row; copied only where the weight is neither contiguous nor channels_last.
Tensor rows_of(const Tensor& weight) {
  const int64_t C = weight.size(0);
  if (lies_channels_last(weight)) return view(weight, {C, 9 * C}, {9 * C, 1});
  const int64_t shape[] = {C, 9 * C};
  return torch::stable::view(torch::stable::contiguous(weight), {shape, 2});
}

template <class... Arguments>
void call_out(const char* op, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes over the result, which is the last argument
}

// ---- patches -----------------------------------------------------------------------------------------------------

// Moves the elements of a map into patches, zeros where a patch leaves the map; or the other way, zeros where the map
// leaves the patches.
template <class T, bool INTO_PATCHES>
void move_patches(const Downsample& op, const Map& map, const Tensor& patches) {
  T* const data = static_cast<T*>(map.data);
  T* const numbers = static_cast<T*>(patches.data_ptr());
  const int64_t rows = std::max((op.H + 2) / 3, op.h), columns = std::max((op.W + 2) / 3, op.w);
  // Channels at a time: of as many the lines of the map stay near.
  const int64_t block = map.channel == 1 ? op.C : 16;
  in_parallel(op.B * rows, 9 * op.C * columns, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / rows, y = item % rows;
      for (int64_t c0 = 0; c0 < op.C; c0 += block)
        for (int64_t x = 0; x < columns; ++x) {
          const int64_t channels = std::min(block, op.C - c0), height = op.H - 3 * y, width = op.W - 3 * x;
          const bool patch = y < op.h && x < op.w;
          T* const element = data + b * map.batch + c0 * map.channel + 3 * y * map.row + 3 * x * map.column;
          T* const number = numbers + ((b * op.h + y) * op.w + x) * 9 * op.C + c0 * (op.channels_first ? 9 : 1);
          const auto move = [&](int64_t c, int64_t i, int64_t j, int64_t in_patch) {
            T* const at = element + c * map.channel + i * map.row + j * map.column;
            const bool inside = i < height && j < width;
            if (INTO_PATCHES && patch) number[in_patch] = inside ? *at : 0;
            if (!INTO_PATCHES && inside) *at = patch ? number[in_patch] : 0;
          };
          if (op.channels_first)
            for (int64_t c = 0; c < channels; ++c)
              for (int64_t i = 0; i < 3; ++i)
                for (int64_t j = 0; j < 3; ++j) move(c, i, j, 9 * c + 3 * i + j);
          else
            for (int64_t i = 0; i < 3; ++i)
              for (int64_t j = 0; j < 3; ++j)
                for (int64_t c = 0; c < channels; ++c) move(c, i, j, (3 * i + j) * op.C + c);
        }
    }
  });
}

// A map [B, C, h, w] from or to rows [B h w, C].
template <class T, bool INTO_ROWS>
void copy_tokens(const Downsample& op, const Map& map, const Tensor& rows) {
  T* const all = static_cast<T*>(rows.data_ptr());
  in_parallel(op.B * op.h, op.w * op.C, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item)
      for (int64_t x = 0; x < op.w; ++x) {
        T* element = static_cast<T*>(map.data) + item / op.h * map.batch + item % op.h * map.row + x * map.column;
        T* row = all + (item * op.w + x) * op.C;
        for (int64_t c = 0; c < op.C; ++c)
          if constexpr (INTO_ROWS)
            row[c] = element[c * map.channel];
          else
            element[c * map.channel] = row[c];
      }
  });
}

// Does a product of ours do better than torch's? Where there is little to multiply it is no slower, but torch's sums run
// in several chains there and are closer to the truth.
bool own_product(const Downsample& op) {
  return (op.bf16 ? cpu_has_bf16() : cpu_isa() != Isa::baseline) && op.patches() * 9 * op.C * op.C >= 1 << 20;
}

// ---- the op ------------------------------------------------------------------------------------------------------

// torch's convolution, which wins over its own products where there are many patches; for patches that all lie within
// the image.
Tensor convolve(const Tensor& image, const Tensor& weight, const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  const std::vector<int64_t> strides{3, 3}, none{0, 0}, ones{1, 1};
  std::array<StableIValue, 7> stack{from(image), from(weight), from(bias), from(strides), from(none), from(ones),
                                    from(int64_t{1})};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::conv2d", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

template <class T>
void forward(const Downsample& op, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& out) {
  const Tensor patches = empty(out, op.patches(), 9 * op.C);
  move_patches<T, true>(op, op.image, patches);
  const Map map = map_of(out);
  const bool in_place =
      map.channel == 1 && map.column == op.C && map.row == op.w * op.C && map.batch == op.h * op.w * op.C;
  const Tensor rows = in_place ? view(out, {op.patches(), op.C}, {op.C, 1}) : empty(out, op.patches(), op.C);
  if (own_product(op)) {
    const Tensor matrix = rows_of(weight);
    const std::optional<Tensor> vector = bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
    const std::optional<Floats> floats = vector ? std::optional<Floats>(*vector) : std::nullopt;
    Linear l{};
    l.rows = op.patches(), l.columns = op.C, l.terms = 9 * op.C, l.together = op.h * op.w, l.bf16 = op.bf16;
    l.x = patches.data_ptr(), l.x_row = 9 * op.C, l.weight = matrix.data_ptr();
    l.bias = bias ? floats->data : nullptr, l.out = rows.data_ptr();
    linear(l);
  } else {
    call_out("aten::linear", patches, rows_of(weight), bias, rows);
  }
  if (!in_place) copy_tokens<T, false>(op, map, rows);
}

// out = a b
void product(const Downsample& op, const Tensor& a, const Tensor& b, const Tensor& out) {
  if (op.bf16 || !own_product(op)) return call_out("aten::mm", a, b, out);
  const auto matrix = [](const Tensor& t) {
    return Matrix{static_cast<float*>(t.data_ptr()), t.stride(0), t.stride(1)};
  };
  multiply_all(a.size(0), b.size(1), a.size(1), matrix(a), matrix(b), matrix(out), false);
}

template <class T>
void backward(const Downsample& op, const Tensor& grad, const Tensor& weight, const Tensor& dimage, Tensor dweight,
              std::optional<Tensor> dbias) {
  const int64_t C = op.C, n = op.patches();
  const Tensor rows = empty(grad, n, C), patches = empty(grad, n, 9 * C);
  copy_tokens<T, true>(op, map_of(grad), rows);
  if (dbias) {
    const int64_t down[] = {0};
    torch::stable::sum_out(*dbias, rows, IntHeaderOnlyArrayRef(down, 1));
  }
  move_patches<T, true>(op, op.image, patches);
  const bool in_place = op.channels_first ? dweight.is_contiguous() : lies_channels_last(dweight);
  const Tensor gradient = in_place ? view(dweight, {C, 9 * C}, {9 * C, 1}) : empty(grad, C, 9 * C);
  product(op, view(rows, {C, n}, {1, C}), patches, gradient);
  if (!in_place) {
    const std::vector<int64_t> strides =
        op.channels_first ? std::vector<int64_t>{9 * C, 9, 3, 1} : std::vector<int64_t>{9 * C, 1, 3 * C, C};
    torch::stable::copy_(dweight, view(gradient, {C, C, 3, 3}, strides));
  }
  product(op, rows, rows_of(weight), patches);
  move_patches<T, false>(op, map_of(dimage), patches);
}

void downsample_fwd(const Tensor& image,               // [B, C, H, W]
                    const Tensor& weight,              // [C, C, 3, 3]
                    const std::optional<Tensor>& bias,  // [C]
                    Tensor out) {                      // [B, C, h, w]
  const Downsample op = arguments(image, weight, out);
  if (bias) check("bias", *bias, {op.C}, image.scalar_type());
  if (!own_product(op) && op.patches() > op.C / 2 && 3 * op.h <= op.H && 3 * op.w <= op.W)
    torch::stable::copy_(out, convolve(image, weight, bias));
  else
    (op.bf16 ? forward<uint16_t> : forward<uint32_t>)(op, weight, bias, out);
}

void downsample_bwd(const Tensor& grad,    // [B, C, h, w]
                    const Tensor& image,   // [B, C, H, W]
                    const Tensor& weight,  // [C, C, 3, 3]
                    Tensor dimage, Tensor dweight,
                    std::optional<Tensor> dbias) {  // [C]
  const Downsample op = arguments(image, weight, grad);
  const ScalarType dtype = image.scalar_type();
  check("dimage", dimage, {op.B, op.C, op.H, op.W}, dtype);
  check("dweight", dweight, {op.C, op.C, 3, 3}, dtype);
  if (dbias) check("dbias", *dbias, {op.C}, dtype);
  (op.bf16 ? backward<uint16_t> : backward<uint32_t>)(op, grad, weight, dimage, dweight, dbias);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fusekern_cpp, m) {
  m.def("downsample_fwd(Tensor image, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()");
  m.def(
      "downsample_bwd(Tensor grad, Tensor image, Tensor weight, Tensor(a!) dimage, Tensor(b!) dweight, "
      "Tensor(c!)? dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusekern_cpp, CPU, m) {
  m.impl("downsample_fwd", TORCH_BOX(&downsample_fwd));
  m.impl("downsample_bwd", TORCH_BOX(&downsample_bwd));
}

}  // namespace fusekern
