// The body of former2conv for one instruction set.
//
// A block of pixels x of one head is read once. With the key scaled by scale log2(e),
//   forward   S = K x;  E = 2^(S - max S);  out = x + V^T E / sum E
//   backward  the same for P = E / sum E;  D = V g;  D = scale P (D - sum P D);  dx = g + K^T D;  dK += D x^T;  dV += P g^T
#pragma once

#include "attention_body.h"
#include "former2conv.h"

namespace fusekern::FUSEKERN_ISA {

namespace former2conv {

using namespace attention;

// The tokens of one head: the tall key, and for the forward the wide value, for the backward the wide key and the tall
// value.
template <class A>
struct Packed {
  float *tall_key, *wide, *tall_value;

  Packed(const Former2conv& op, int64_t head)
      : tall_key(op.packed + head * op.packed_floats),
        wide(tall_key + tall_floats<A>(op.size.K, op.size.d)),
        tall_value(wide + wide_floats<A>(op.size.K, op.size.d)) {}
};

template <class A>
static void plan(Former2conv& op, bool backward) {
  const Attention& size = op.size;
  const int64_t K = size.K, d = size.d, both = backward ? 2 : 1;
  const int64_t blocks = (size.H * size.W + PB - 1) / PB, fours = (blocks + 3) / 4;
  const int64_t at_most = size.B * size.heads < 64 ? 64 / (size.B * size.heads) : 1;  // of sums of dkey and dvalue
  op.parts = backward && fours > at_most ? at_most : fours;
  op.packed_floats = both * tall_floats<A>(K, d) + wide_floats<A>(K, d);
  op.partial_floats = 2 * sums_floats(K, d);
  op.scratch_floats = PB + both * (PB * d + 2 * PB * W * panels(d) + K * LD) + units<A>(K) * LD;
}

template <class A, class T>
static void pack(const Former2conv& op, bool backward, int64_t begin, int64_t end) {
  const int64_t K = op.size.K, d = op.size.d;
  for (int64_t head = begin; head < end; ++head) {
    const Packed<A> to(op, head);
    const Head<T> key(op.key, op.size, head), value(op.value, op.size, head);
    to_tall<A>(key, 0, K, d, to.tall_key);
    to_wide<A>(backward ? key : value, K, d, units<A>(K), to.wide);
    if (backward) to_tall<A>(value, 0, K, d, to.tall_value);
  }
}

// Scores become 2^(score - most), joined; factor becomes 1 / their sum.
template <class A>
static void softmax(float* scores, int64_t K, int vectors, const V* most, float* factor) {
  for (int j = 0; j < vectors; ++j) {
    V sum = zero();
    for (int64_t u = 0; u < units<A>(K); ++u) {
      V e[A::PER];
      for (int i = 0; i < A::PER; ++i) {
        const int64_t k = u * A::PER + i;
        e[i] = k < K ? exp2(load(scores + k * LD + j * W) - most[j]) : zero();
        sum = sum + e[i];
      }
      store(scores + u * LD + j * W, A::join(e));
    }
    store(factor + j * W, set1(1.f) / sum);
  }
}

template <class A, class T>
static void forward(const Former2conv& op, float* scratch, int64_t begin, int64_t end) {
  const Attention& size = op.size;
  const int64_t K = size.K, d = size.d, N = size.H * size.W, blocks = (N + PB - 1) / PB;
  float* columns = scratch;
  float* scores = columns + PB * d;
  float* factor = scores + K * LD;
  T* buffer = reinterpret_cast<T*>(factor + PB);
  const T* rows[PB];
  V most[4];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item % size.heads, part = item / size.heads % op.parts, b = item / size.heads / op.parts;
    const Packed<A> packed(op, b * size.heads + head);
    for (int64_t n = blocks * part / op.parts * PB; n < N && n < blocks * (part + 1) / op.parts * PB; n += PB) {
      const int pixels = at_most_a_block(N - n);
      const Block<T> x(op.image, size.W, b, head * d, n, pixels), out(op.out, size.W, b, head * d, n, pixels);
      to_columns<A>(x, d, columns);
      const Block<T> next(op.image, size.W, b, head * d, n + PB, at_most_a_block(N - n - PB));
      score<A, true>(packed.tall_key, columns, K, d, x.vectors(), size.scale * LOG2E, scores, most,
                     [&](int64_t i, int64_t count) { next.prefetch(d, i, count), out.prefetch(d, i, count); });
      softmax<A>(scores, K, x.vectors(), most, factor);
      if (out.channel == 1) to_rows<A>(x, columns, d, buffer, rows);
      spread<A, true>(scores, packed.wide, units<A>(K), d, factor, rows, columns, out);
    }
  }
}

// On entry scores and the products V g in dscores; on exit P and D, by pixels, and D joined.
template <class A>
static void softmax_backward(float* scores, float* dscores, int64_t K, int pixels, const V* most, float scale,
                             float* joined) {
  for (int j = 0; j * W < pixels; ++j) {
    const Lanes lanes = first(pixels - j * W);
    V sum = zero(), mean = zero();
    for (int64_t k = 0; k < K; ++k) {
      float* at = scores + k * LD + j * W;
      const V e = exp2(load(at) - most[j]);
      store(at, e);
      sum = sum + e;
      mean = fma(e, load(dscores + k * LD + j * W), mean);
    }
    const V factor = set1(1.f) / sum;
    mean = mean * factor;
    for (int64_t u = 0; u < units<A>(K); ++u) {
      V D[A::PER];
      for (int i = 0; i < A::PER; ++i) {
        const int64_t k = u * A::PER + i, at = k * LD + j * W;
        if (k < K) {
          const V P = load(scores + at) * factor;
          D[i] = P * set1(scale) * (load(dscores + at) - mean);
          A::store_pixels(scores + k * LD, j * W, only(P, lanes));
          A::store_pixels(dscores + k * LD, j * W, only(D[i], lanes));
        } else {
          D[i] = zero();
        }
      }
      if (A::PER > 1) store(joined + u * LD + j * W, A::join(D));
    }
  }
}

template <class A, class T>
static void backward(const Former2conv& op, float* scratch, int64_t begin, int64_t end) {
  const Attention& size = op.size;
  const int64_t K = size.K, d = size.d, N = size.H * size.W, blocks = (N + PB - 1) / PB, length = W * panels(d);
  float* ones = scratch;
  float* x_columns = ones + PB;
  float* g_columns = x_columns + PB * d;
  float* scores = g_columns + PB * d;
  float* dscores = scores + K * LD;
  float* joined = A::PER > 1 ? dscores + K * LD : dscores;
  float* x_units = dscores + (K + units<A>(K)) * LD;
  float* g_units = x_units + PB * length;
  T* x_buffer = reinterpret_cast<T*>(g_units + PB * length);
  T* g_buffer = x_buffer + PB * length;
  const T *x_rows[PB], *g_rows[PB];
  const float *x_pairs[PB], *g_pairs[PB];
  V most[4];
  for (int n = 0; n < PB; ++n) ones[n] = 1.f;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t part = item % op.parts, head = item / op.parts, b = head / size.heads, c = head % size.heads * d;
    const Packed<A> packed(op, head);
    float* dkey = op.partial + item * op.partial_floats;
    float* dvalue = dkey + sums_floats(K, d);
    for (int64_t i = 0; i < op.partial_floats; ++i) dkey[i] = 0.f;
    for (int64_t n = blocks * part / op.parts * PB; n < N && n < blocks * (part + 1) / op.parts * PB; n += PB) {
      const int pixels = at_most_a_block(N - n);
      const Block<T> x(op.image, size.W, b, c, n, pixels), g(op.grad, size.W, b, c, n, pixels);
      to_columns<A>(x, d, x_columns);
      to_columns<A>(g, d, g_columns);
      to_rows<A>(x, x_columns, d, x_buffer, x_rows);
      to_rows<A>(g, g_columns, d, g_buffer, g_rows);
      const Block<T> dx(op.dimage, size.W, b, c, n, pixels);
      const Block<T> next_x(op.image, size.W, b, c, n + PB, at_most_a_block(N - n - PB));
      const Block<T> next_g(op.grad, size.W, b, c, n + PB, at_most_a_block(N - n - PB));
      score<A, true>(packed.tall_key, x_columns, K, d, x.vectors(), size.scale * LOG2E, scores, most,
                     [&](int64_t i, int64_t count) {
                       next_x.prefetch(d, i, count), next_g.prefetch(d, i, count), dx.prefetch(d, i, count);
                     });
      score<A, false>(packed.tall_value, g_columns, K, d, x.vectors(), 1.f, dscores, nullptr);
      softmax_backward<A>(scores, dscores, K, pixels, most, size.scale, joined);
      spread<A, true>(joined, packed.wide, units<A>(K), d, ones, g_rows, g_columns, dx);
      const int64_t count = units<A>(pixels);
      gather<A>(dscores, to_pixel_units<A>(x_rows, pixels, d, x_units, x_pairs), K, d, count, nullptr, dkey);
      gather<A>(scores, to_pixel_units<A>(g_rows, pixels, d, g_units, g_pairs), K, d, count, nullptr, dvalue);
    }
  }
}

template <class T>
static void add(const Former2conv& op, int64_t begin, int64_t end) {
  const int64_t K = op.size.K, d = op.size.d;
  for (int64_t head = begin; head < end; ++head) {
    const float* from = op.partial + head * op.parts * op.partial_floats;
    add_up(from, op.parts, op.partial_floats, K, d, Head<T>(op.dkey, op.size, head));
    add_up(from + sums_floats(K, d), op.parts, op.partial_floats, K, d, Head<T>(op.dvalue, op.size, head));
  }
}

// The arithmetic A and the type T in memory, as types.
template <class F>
static void choose(const Former2conv& op, F f) {
#if FUSEKERN_WIDTH == 16
  if (op.pairs) return f(Pairs(), bf16());
#endif
  op.bf16 ? f(Single(), bf16()) : f(Single(), float());
}

}  // namespace former2conv

void former2conv_plan(Former2conv& op, bool backward) {
  former2conv::choose(op, [&](auto A, auto) { former2conv::plan<decltype(A)>(op, backward); });
}

void former2conv_pack(const Former2conv& op, bool backward, int64_t begin, int64_t end) {
  former2conv::choose(op, [&](auto A, auto T) { former2conv::pack<decltype(A), decltype(T)>(op, backward, begin, end); });
}

void former2conv_fwd(const Former2conv& op, float* scratch, int64_t begin, int64_t end) {
  former2conv::choose(op, [&](auto A, auto T) { former2conv::forward<decltype(A), decltype(T)>(op, scratch, begin, end); });
}

void former2conv_bwd(const Former2conv& op, float* scratch, int64_t begin, int64_t end) {
  former2conv::choose(op, [&](auto A, auto T) { former2conv::backward<decltype(A), decltype(T)>(op, scratch, begin, end); });
}

void former2conv_add(const Former2conv& op, int64_t begin, int64_t end) {
  op.bf16 ? former2conv::add<bf16>(op, begin, end) : former2conv::add<float>(op, begin, end);
}

}  // namespace fusekern::FUSEKERN_ISA
