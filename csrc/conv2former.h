// conv2former: attention of text queries over the tokens of a map. What conv2former.cpp hands to the bodies.
#pragma once

#include "attention.h"
#include "cpu.h"

namespace fusekern {

struct Conv2former {
  Attention size;     // H, W are those of tokens
  bool bf16, pairs;   // bf16, else fp32; multiplied in pairs
  Tokens query, out;  // [B, K, C]
  Map tokens;         // [B, C, H, W]
  float* lse;         // [B heads][K]: log2 of the mean of e^score over the tokens

  // Of the backward alone.
  Tokens grad, dquery;  // [B, K, C]
  Map dtokens;          // [B, C, H, W]

  int64_t parts;                                          // forward: of the queries, backward: of the tokens; an item each
  int64_t packed_floats, scratch_floats, partial_floats;  // of a head, of a thread, of an item of the backward
  float *packed, *partial;                                // [B heads][packed_floats], [B heads][parts][partial_floats]
};

// Each works on the items named, begin to end - 1.
FUSEKERN_BODY(
    // Fills in parts and floats.
    void conv2former_plan(Conv2former& op, bool backward);
    // Items are B heads parts: op.out and op.lse.
    void conv2former_fwd(const Conv2former& op, float* scratch, int64_t begin, int64_t end);
    // Items are B heads: op.packed.
    void conv2former_pack(const Conv2former& op, int64_t begin, int64_t end);
    // Items are B heads parts: op.dtokens and op.partial.
    void conv2former_bwd(const Conv2former& op, float* scratch, int64_t begin, int64_t end);
    // Items are B heads: op.dquery.
    void conv2former_add(const Conv2former& op, int64_t begin, int64_t end);
)

}  // namespace fusekern
