// Inner products of pixels and text tokens: what score_map.cpp hands to the bodies.
#pragma once

#include <cstdint>

#include "attention.h"
#include "cpu.h"

namespace fusekern {

struct ScoreMap {
  int64_t B, C, H, W, K;
  bool bf16;  // else fp32
  bool normalize, concat;
  Map image;     // [B, C, H, W]
  Tokens text;   // [B, K, C]
  Map out;       // [B, K, H, W] or with concat [B, C + K, H, W]; channels or pixels side by side
  float* packed;  // [B][text_floats]

  Map grad, dimage;  // these and what follows: of the backward alone; dimage as out
  Tokens dtext;
  float* partial;  // [B][chunks][text_floats]: the gradient of a text, summed over a chunk of the pixels
  int64_t chunks, chunk_tiles;

  int64_t tiles;           // of the pixels of an image
  int64_t text_floats;     // of a packed text
  int64_t scratch_floats;  // of a thread
};

FUSEKERN_BODY(
    // Fills in the last three.
    void score_map_plan(ScoreMap& op);
    // Items are texts.
    void score_map_pack(const ScoreMap& op, bool backward, int64_t begin, int64_t end, float* scratch);
    void score_map_sum(const ScoreMap& op, int64_t begin, int64_t end, float* scratch);
    // Items are tiles of all images.
    void score_map_fwd(const ScoreMap& op, int64_t begin, int64_t end, float* scratch);
    // Items are chunks of all images.
    void score_map_bwd(const ScoreMap& op, int64_t begin, int64_t end, float* scratch);)

}  // namespace fusekern
