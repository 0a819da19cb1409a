// former2conv: attention of pixels over text tokens, added to the image. What former2conv.cpp hands to the bodies.
#pragma once

#include "attention.h"
#include "cpu.h"

namespace fusekern {

struct Former2conv {
  Attention size;
  bool bf16, pairs;   // bf16, else fp32; multiplied in pairs
  Map image, out;     // [B, C, H, W]
  Tokens key, value;  // [B, K, C]

  // Of the backward alone.
  Map grad, dimage;     // [B, C, H, W]
  Tokens dkey, dvalue;  // [B, K, C]

  int64_t parts;                                            // of the pixels of a map, an item each
  int64_t packed_floats, scratch_floats, partial_floats;  // of a head, of a thread, of an item of the backward
  float *packed, *partial;                                  // [B heads][packed_floats], [B heads][parts][partial_floats]
};

// Each works on the items named, begin to end - 1.
FUSEKERN_BODY(
    // Fills in parts and floats.
    void former2conv_plan(Former2conv& op, bool backward);
    // Items are B heads: op.packed.
    void former2conv_pack(const Former2conv& op, bool backward, int64_t begin, int64_t end);
    // Items are B parts heads: op.out.
    void former2conv_fwd(const Former2conv& op, float* scratch, int64_t begin, int64_t end);
    // Items are B heads parts: op.dimage and op.partial.
    void former2conv_bwd(const Former2conv& op, float* scratch, int64_t begin, int64_t end);
    // Items are B heads: op.dkey and op.dvalue.
    void former2conv_add(const Former2conv& op, int64_t begin, int64_t end);
)

}  // namespace fusekern
