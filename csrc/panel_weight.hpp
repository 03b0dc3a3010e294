// Weights of 4 or 8 bits with a scale per group, in panels.
//
// Letters: K input features, N output channels, G groups of features, each with a scale.
#pragma once

#include <cstdint>

namespace fewbits {

// A panel holds 32 output channels; the last one is padded with zeros.
//
//   panel: | word 0 of channel 0 | word 0 of channel 1 | … | word 0 of channel 31 | word 1 of channel 0 | …
//          |<----- 4 bytes ----->|
//
// A word is what the codes are in a row of the weight: 4 codes of 8 bits, or 8 codes of 4 bits, the first in the low
// half of a byte. A decode step reads the panels as one stream; a vector of words holds as many channels as it has
// lanes.
constexpr int64_t kPanelChannels = 32;
constexpr int64_t kWordBytes = 4;
constexpr int64_t kPanelStep = kPanelChannels * kWordBytes;  // bytes of a panel for one word of each channel
constexpr int64_t kPanelRows = 12;                           // rows of a tile of activations

struct PanelWeight {
  const uint8_t* packed;  // panels
  const void* scales;     // [panels][G][32] float32 or bfloat16
  bool bf16_scales;
  int64_t N, G;
  int64_t words;  // of a group: a word holds features of one group

  int64_t count() const { return (N + kPanelChannels - 1) / kPanelChannels; }
  const uint8_t* panel(int64_t index) const { return packed + index * G * words * kPanelStep; }
  const void* scales_of(int64_t panel) const {
    const int64_t bytes = panel * G * kPanelChannels * (bf16_scales ? 2 : 4);
    return static_cast<const char*>(scales) + bytes;
  }
};

// How the codes of a weight become numbers, before they are scaled.
enum class Codes : int32_t { kTable, kInt8, kE4m3 };

}  // namespace fewbits
