// The body of conv2former for one instruction set.
//
// A block of tokens x of one head is key and value alike and is read once. With the query scaled by scale log2(e),
//   forward   S = Q x;  m' = max(m, max S);  E = 2^(S - m');  A = 2^(m - m') A + E x^T, and the sum of E likewise
//             in the end out = A / sum E and lse = m + log2 (sum E / N)
//   backward  P = 2^(S - lse) / N;  D = scale P (g x - g . out);  dx = g^T P + Q^T D, in one sum;  dQ += D x^T
// Without the N, the number of tokens, lse would be large, and P would suffer from its rounding.
#pragma once

#include "attention_body.h"
#include "conv2former.h"

namespace fusekern::FUSEKERN_ISA {

namespace conv2former {

using namespace attention;

constexpr int64_t QUERIES = 96;  // at most so many to an item of the forward: its sums stay in the cache

// What a forward item keeps per query, over the blocks.
struct State {
  float *most, *decay;  // [QUERIES]
  float* total;         // [QUERIES][W], the sum of E by lanes
};

// Scores become 2^(score - most'), by pixels; most and total are brought up to date and decay is 2^(most - most').
template <class A>
static void softmax(float* scores, int64_t K, int pixels, const State& state) {
  const int vectors = (pixels + W - 1) / W;
  float beyond[PB];  // takes lanes without a token out of the softmax
  for (int n = 0; n < PB; ++n) beyond[n] = n < pixels ? 0.f : -__builtin_inff();
  for (int64_t k = 0; k < K; ++k) {
    float* row = scores + k * LD;
    float* last = row + (vectors - 1) * W;
    if (pixels % W) store(last, load(last) + load(beyond + (vectors - 1) * W));
    V top = load(row);
    for (int j = 1; j < vectors; ++j) top = max(load(row + j * W), top);
    state.decay[k] = max(top);
  }
  for (int64_t k = 0; k < K; k += W) {
    const V before = load(state.most + k), now = max(load(state.decay + k), before);
    store(state.most + k, now);
    store(state.decay + k, exp2(before - now));
  }
  for (int64_t k = 0; k < K; ++k) {
    float* row = scores + k * LD;
    const V most = set1(state.most[k]);
    V sum = load(state.total + k * W) * set1(state.decay[k]);
    for (int j = 0; j < vectors; ++j) {
      const V e = exp2(load(row + j * W) - most);
      A::store_pixels(row, j * W, e);
      sum = sum + e;
    }
    store(state.total + k * W, sum);
  }
}

template <class A, class T>
static void forward(const Conv2former& op, float* scratch, int64_t begin, int64_t end) {
  const Attention& size = op.size;
  const int64_t d = size.d, N = size.H * size.W, length = W * panels(d);
  State state{scratch, scratch + QUERIES, scratch + 2 * QUERIES};
  float* sums = state.total + QUERIES * W;  // [QUERIES][length]
  float* tall = sums + QUERIES * length;
  float* scores = tall + tall_floats<A>(QUERIES, d);
  float* columns = scores + QUERIES * LD;
  float* row_units = columns + PB * d;
  T* buffer = reinterpret_cast<T*>(row_units + PB * length);
  const T* rows[PB];
  const float* pairs[PB];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t part = item % op.parts, head = item / op.parts, b = head / size.heads, c = head % size.heads * d;
    const int64_t first_query = size.K * part / op.parts, K = size.K * (part + 1) / op.parts - first_query;
    const Head<T> query(op.query, size, head), out(op.out, size, head);
    to_tall<A>(query, first_query, first_query + K, d, tall);
    for (int64_t k = 0; k < QUERIES; ++k) state.most[k] = LEAST, state.decay[k] = 0.f;
    for (int64_t i = 0; i < K * W; ++i) state.total[i] = 0.f;
    for (int64_t i = 0; i < K * length; ++i) sums[i] = 0.f;
    for (int64_t n = 0; n < N; n += PB) {
      const int pixels = N - n < PB ? static_cast<int>(N - n) : PB;
      const Block<T> x(op.tokens, size.W, b, c, n, pixels);
      to_columns<A>(x, d, columns);
      to_rows<A>(x, columns, d, buffer, rows);
      score<A, false>(tall, columns, K, d, x.vectors(), size.scale * LOG2E, scores, nullptr);
      softmax<A>(scores, K, pixels, state);
      gather<A>(scores, to_pixel_units<A>(rows, pixels, d, row_units, pairs), K, d, units<A>(pixels), state.decay, sums);
    }
    for (int64_t k = 0; k < K; ++k) {
      const float total = sum(load(state.total + k * W)), factor = 1.f / total;
      for (int64_t i = 0; i < d; i += W)
        store_channels(out, first_query + k, i, d, load(sums + k * length + i) * set1(factor));
      op.lse[head * size.K + first_query + k] = state.most[k] + __builtin_log2f(total / static_cast<float>(N));
    }
  }
}

// What the backward needs of the queries of one head: the tall query and gradient; the wide gradient and below it, in
// the same panels, the wide query; grad . out.
template <class A>
struct Packed {
  float *tall_query, *tall_grad, *wide, *dot;

  Packed(const Conv2former& op, int64_t head)
      : tall_query(op.packed + head * op.packed_floats),
        tall_grad(tall_query + tall_floats<A>(op.size.K, op.size.d)),
        wide(tall_grad + tall_floats<A>(op.size.K, op.size.d)),
        dot(wide + 2 * wide_floats<A>(op.size.K, op.size.d)) {}
};

template <class A, class T>
static void pack(const Conv2former& op, int64_t begin, int64_t end) {
  const int64_t K = op.size.K, d = op.size.d, pitch = 2 * units<A>(K);
  for (int64_t head = begin; head < end; ++head) {
    const Packed<A> to(op, head);
    const Head<T> query(op.query, op.size, head), grad(op.grad, op.size, head), out(op.out, op.size, head);
    to_tall<A>(query, 0, K, d, to.tall_query);
    to_tall<A>(grad, 0, K, d, to.tall_grad);
    to_wide<A>(grad, K, d, pitch, to.wide);
    to_wide<A>(query, K, d, pitch, to.wide + units<A>(K) * W);
    for (int64_t k = 0; k < K; ++k) {
      V products = zero();
      for (int64_t c = 0; c < d; c += W)
        products = fma(channel_units<Single>(grad, k, c, d), channel_units<Single>(out, k, c, d), products);
      to.dot[k] = sum(products);
    }
  }
}

// On entry scores and the products g x in dscores; on exit D, by pixels, and joined P and, below it, joined D.
// N pixels in all. Where they lie in this one block, it gives the sum of P and the mean g . out free of rounding in
// lse and out: if one token outweighs the others, its D is what these leave of a difference.
template <class A>
static void softmax_backward(float* scores, float* dscores, int64_t K, int pixels, int64_t N, const float* lse,
                             const float* dot, float scale, float* joined) {
  const int vectors = (pixels + W - 1) / W;
  for (int64_t u = 0; u < units<A>(K); ++u) {
    V P[4][A::PER], D[4][A::PER];
    for (int i = 0; i < A::PER; ++i) {
      const int64_t k = u * A::PER + i;
      if (k >= K) {
        for (int j = 0; j < vectors; ++j) P[j][i] = D[j][i] = zero();
        continue;
      }
      V total = zero(), products = zero();
      for (int j = 0; j < vectors; ++j) {
        P[j][i] = only(exp2(load(scores + k * LD + j * W) - set1(lse[k])), first(pixels - j * W));
        total = total + P[j][i];
        products = fma(P[j][i], load(dscores + k * LD + j * W), products);
      }
      const float share = 1.f / (N == pixels ? sum(total) : static_cast<float>(N));
      const float mean = N == pixels ? sum(products) * share : dot[k];
      for (int j = 0; j < vectors; ++j) {
        P[j][i] = P[j][i] * set1(share);
        D[j][i] = P[j][i] * set1(scale) * (load(dscores + k * LD + j * W) - set1(mean));
        A::store_pixels(dscores + k * LD, j * W, only(D[j][i], first(pixels - j * W)));
      }
    }
    for (int j = 0; j < vectors; ++j) {
      store(joined + u * LD + j * W, A::join(P[j]));
      if (A::PER > 1) store(joined + (units<A>(K) + u) * LD + j * W, A::join(D[j]));
    }
  }
}

template <class A, class T>
static void backward(const Conv2former& op, float* scratch, int64_t begin, int64_t end) {
  const Attention& size = op.size;
  const int64_t K = size.K, d = size.d, N = size.H * size.W, blocks = (N + PB - 1) / PB, length = W * panels(d);
  float* scores = scratch;
  float* dscores = scores + K * LD;
  float* joined = A::PER > 1 ? dscores + K * LD : scores;
  float* columns = dscores + (K + 2 * units<A>(K)) * LD;
  float* row_units = columns + PB * d;
  T* buffer = reinterpret_cast<T*>(row_units + PB * length);
  const T* rows[PB];
  const float* pairs[PB];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t part = item % op.parts, head = item / op.parts, b = head / size.heads, c = head % size.heads * d;
    const Packed<A> packed(op, head);
    float* dquery = op.partial + item * op.partial_floats;
    for (int64_t i = 0; i < op.partial_floats; ++i) dquery[i] = 0.f;
    for (int64_t n = blocks * part / op.parts * PB; n < N && n < blocks * (part + 1) / op.parts * PB; n += PB) {
      const int pixels = N - n < PB ? static_cast<int>(N - n) : PB;
      const Block<T> x(op.tokens, size.W, b, c, n, pixels), dx(op.dtokens, size.W, b, c, n, pixels);
      to_columns<A>(x, d, columns);
      to_rows<A>(x, columns, d, buffer, rows);
      score<A, false>(packed.tall_query, columns, K, d, x.vectors(), size.scale * LOG2E, scores, nullptr);
      score<A, false>(packed.tall_grad, columns, K, d, x.vectors(), 1.f, dscores, nullptr);
      softmax_backward<A>(scores, dscores, K, pixels, N, op.lse + head * K, packed.dot, size.scale, joined);
      spread<A, false, T>(joined, packed.wide, 2 * units<A>(K), d, nullptr, nullptr, nullptr, dx);
      gather<A>(dscores, to_pixel_units<A>(rows, pixels, d, row_units, pairs), K, d, units<A>(pixels), nullptr, dquery);
    }
  }
}

template <class T>
static void add(const Conv2former& op, int64_t begin, int64_t end) {
  for (int64_t head = begin; head < end; ++head)
    add_up(op.partial + head * op.parts * op.partial_floats, op.parts, op.partial_floats, op.size.K, op.size.d,
           Head<T>(op.dquery, op.size, head));
}

template <class A>
static void plan(Conv2former& op, bool backward) {
  const Attention& size = op.size;
  const int64_t K = size.K, d = size.d, length = W * panels(d), block = PB * (d + 2 * length);
  if (backward) {
    const int64_t blocks = (size.H * size.W + PB - 1) / PB, fours = (blocks + 3) / 4;
    const int64_t at_most = size.B * size.heads < 64 ? 64 / (size.B * size.heads) : 1;  // of sums of dquery
    op.parts = fours < at_most ? fours : at_most;
    op.packed_floats = 2 * (tall_floats<A>(K, d) + wide_floats<A>(K, d)) + W * panels(K);
    op.partial_floats = sums_floats(K, d);
    op.scratch_floats = 2 * (K + units<A>(K)) * LD + block;
  } else {
    op.parts = (K + QUERIES - 1) / QUERIES;
    op.scratch_floats = QUERIES * (2 + W + length + LD) + tall_floats<A>(QUERIES, d) + block;
  }
}

// The arithmetic A and the type T in memory, as types.
template <class F>
static void choose(const Conv2former& op, F f) {
#if FUSEKERN_WIDTH == 16
  if (op.pairs) return f(Pairs(), bf16());
#endif
  op.bf16 ? f(Single(), bf16()) : f(Single(), float());
}

}  // namespace conv2former

void conv2former_plan(Conv2former& op, bool backward) {
  conv2former::choose(op, [&](auto A, auto) { conv2former::plan<decltype(A)>(op, backward); });
}

void conv2former_fwd(const Conv2former& op, float* scratch, int64_t begin, int64_t end) {
  conv2former::choose(op, [&](auto A, auto T) { conv2former::forward<decltype(A), decltype(T)>(op, scratch, begin, end); });
}

void conv2former_pack(const Conv2former& op, int64_t begin, int64_t end) {
  conv2former::choose(op, [&](auto A, auto T) { conv2former::pack<decltype(A), decltype(T)>(op, begin, end); });
}

void conv2former_bwd(const Conv2former& op, float* scratch, int64_t begin, int64_t end) {
  conv2former::choose(op, [&](auto A, auto T) { conv2former::backward<decltype(A), decltype(T)>(op, scratch, begin, end); });
}

void conv2former_add(const Conv2former& op, int64_t begin, int64_t end) {
  op.bf16 ? conv2former::add<bf16>(op, begin, end) : conv2former::add<float>(op, begin, end);
}

}  // namespace fusekern::FUSEKERN_ISA
