// A linear layer on tokens, with what follows it done while its results are in registers: bias, residual, gate.
//
// Included once per instruction set, hence the anonymous namespace.
#pragma once

#include <algorithm>

#include "decoder.hpp"
#include "int4_matmul.hpp"
#include "int8_matmul.hpp"
#include "vector.hpp"
#include "weight_only_matmul.hpp"

namespace {

// The tile `tile` of int8 tokens by panel `panel` of a weight: out [rows, kPanelChannels], scales and bias applied.
void int8_tile(const fewbits::Weight& weight, const fewbits::Tokens& tokens, int64_t panel, int64_t tile,
               const float* bias, float* out) {
  alignas(64) int32_t sums[fewbits::kPanelRows * fewbits::kPanelChannels];
  alignas(64) float scales[fewbits::kPanelChannels] = {};
  const int64_t rows = tokens.rows_of(tile), first = panel * fewbits::kPanelChannels, steps = tokens.features() / 4;
  const int64_t channels = std::min(fewbits::kPanelChannels, weight.panels.N - first);
  std::memcpy(scales, static_cast<const float*>(weight.panels.scales) + first,
              static_cast<size_t>(channels) * sizeof(float));
  const int64_t panel_bytes = fewbits::kHeaderBytes + steps * fewbits::kStepBytes;
  const auto* packed = reinterpret_cast<const int8_t*>(weight.panels.packed) + panel * panel_bytes;
  sums_of_rows(tokens.tile(tile), packed, steps, rows, sums);
  for (int64_t r = 0; r < rows; ++r) {
    const float token_scale = tokens.scales[tile * fewbits::kPanelRows + r];
    for (int64_t n = 0; n < fewbits::kPanelChannels; ++n) {
      const int64_t at = r * fewbits::kPanelChannels + n;
      out[at] = static_cast<float>(sums[at]) * token_scale * scales[n] + bias[n];
    }
  }
}

// The same for whatever kind the weight is of.
void linear_tile(const fewbits::Weight& weight, const fewbits::Tokens& tokens, int64_t panel, int64_t tile,
                 float* out) {
  alignas(64) float bias[fewbits::kPanelChannels] = {};
  const int64_t rows = tokens.rows_of(tile), first = panel * fewbits::kPanelChannels;
  const int64_t channels = std::min(fewbits::kPanelChannels, weight.panels.N - first);
  if (weight.bias) std::memcpy(bias, weight.bias + first, static_cast<size_t>(channels) * sizeof(float));
  if (weight.needs.kind == fewbits::TokenKind::kInt8) return int8_tile(weight, tokens, panel, tile, bias, out);
  const auto run = weight.needs.kind == fewbits::TokenKind::kInt4 ? panel_tile<Int4Sums>
                   : weight.how == fewbits::Codes::kTable         ? panel_tile<FloatSums<TableCodes>>
                   : weight.how == fewbits::Codes::kInt8          ? panel_tile<FloatSums<Int8Codes>>
                                                                  : panel_tile<FloatSums<E4m3Codes>>;
  run(weight, tokens, panel, tile, out);
  for (int64_t r = 0; r < rows; ++r) {
    const float token_scale = tokens.scales[tile * fewbits::kPanelRows + r];
    float* of_row = out + r * fewbits::kPanelChannels;
    for (int64_t n = 0; n < fewbits::kPanelChannels; ++n) of_row[n] = of_row[n] * token_scale + bias[n];
  }
}

// Units [begin, end) of a job, counted panel by panel, row tile by row tile.
void linear(const fewbits::Linear& job, int64_t begin, int64_t end) {
  constexpr int64_t kTile = fewbits::kPanelRows * fewbits::kPanelChannels;
  alignas(64) float found[kTile], second[kTile];
  const int64_t row_tiles = job.tokens[0].row_tiles();
  for (int64_t index = begin; index < end; ++index) {
    const int64_t tile = index % row_tiles, rows = job.tokens[0].rows_of(tile);
    int64_t panel = index / row_tiles, offset = 0;
    const fewbits::Weight* weight = job.weights;
    const fewbits::Tokens* tokens = job.tokens;
    for (; panel >= weight->panels.count(); ++weight, ++tokens) {
      panel -= weight->panels.count();
      offset += weight->panels.N;
    }
    linear_tile(*weight, *tokens, panel, tile, found);
    if (job.gated) {
      linear_tile(weight[1], tokens[1], panel, tile, second);
      for (int64_t at = 0; at < rows * fewbits::kPanelChannels; at += kWidth)
        store(found + at, silu(load(found + at)) * load(second + at));
    }
    const int64_t first = panel * fewbits::kPanelChannels;
    const int64_t channels = std::min(fewbits::kPanelChannels, weight->panels.N - first);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (tile * fewbits::kPanelRows + r) * job.stride + offset + first;
      const float* of_row = found + r * fewbits::kPanelChannels;
      if (job.residual)
        for (int64_t n = 0; n < channels; ++n) job.out[at + n] = job.residual[at + n] + of_row[n];
      else
        std::memcpy(job.out + at, of_row, static_cast<size_t>(channels) * sizeof(float));
    }
  }
}

// The same of one weight and tokens that are two digits each: out [M / 2, stride], both results added, then the bias.
void linear_digits(const fewbits::Linear& job, int64_t begin, int64_t end) {
  alignas(64) float found[fewbits::kPanelRows * fewbits::kPanelChannels];
  fewbits::Weight weight = *job.weights;
  weight.bias = nullptr;
  const fewbits::Tokens& tokens = job.tokens[0];
  const int64_t row_tiles = tokens.row_tiles();
  for (int64_t index = begin; index < end; ++index) {
    const int64_t tile = index % row_tiles, panel = index / row_tiles, first = panel * fewbits::kPanelChannels;
    const int64_t channels = std::min(fewbits::kPanelChannels, weight.panels.N - first);
    linear_tile(weight, tokens, panel, tile, found);
    for (int64_t r = 0; r < tokens.rows_of(tile); r += 2) {
      float* out = job.out + (tile * fewbits::kPanelRows + r) / 2 * job.stride + first;
      const float* high = found + r * fewbits::kPanelChannels;
      for (int64_t n = 0; n < channels; ++n) out[n] = high[n] + high[n + fewbits::kPanelChannels];
      if (job.weights->bias)
        for (int64_t n = 0; n < channels; ++n) out[n] += job.weights->bias[first + n];
    }
  }
}

}  // namespace
