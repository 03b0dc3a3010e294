// Heads prepared for attention, and attention of a few queries; attention_block.hpp has that of many.
//
// The ladder, for one query after 512 positions of 9 heads of 64 channels
//   1  each head by itself, over all positions
//   2  the heads of a group together, positions split over threads: the cache is read once
//   3  64 positions at a time: scores, their exponentials, the sum of values, while keys and values are in L1
//
// Included once per instruction set, hence the anonymous namespace.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "decoder.hpp"
#include "rms_norm.hpp"
#include "vector.hpp"

namespace {

constexpr int64_t kChunk = 64;  // positions
constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

// A head of one token [D], normalized if there is a norm, rotated, scaled.
void prepare_head(const fewbits::Attention& job, const float* head, const float* norm, int64_t b, int64_t t,
                  float scale, float* out) {
  const int64_t R = job.R, half = R / 2;
  if (norm)
    rms_norm(head, norm, job.eps, job.D, out);
  else
    std::memcpy(out, head, static_cast<size_t>(job.D) * sizeof(float));
  const float* cos = job.cos + b * job.rotary_batch + t * R;
  const float* sin = job.sin + b * job.rotary_batch + t * R;
  if (job.interleaved) {
    for (int64_t i = 0; i < half; ++i) {
      const float even = out[2 * i], odd = out[2 * i + 1];
      out[2 * i] = even * cos[i] - odd * sin[i];
      out[2 * i + 1] = odd * cos[i] + even * sin[i];
    }
  } else {
    for (int64_t i = 0; i < half; ++i) {
      const float low = out[i], high = out[i + half];
      out[i] = low * cos[i] - high * sin[i];
      out[i + half] = high * cos[i + half] + low * sin[i + half];
    }
  }
  if (scale != 1.0f)
    for (int64_t d = 0; d < job.D; ++d) out[d] *= scale;
}

// Query row r of a group, ready for the keys.
void prepare_query(const fewbits::Attention& job, int64_t b, int64_t g, int64_t r, float* out) {
  const int64_t repeats = job.Q / job.G, t = r / repeats, head = g * repeats + r % repeats;
  const float* token = job.qkv + (b * job.T + t) * job.stride;
  prepare_head(job, token + head * job.D, job.q_norm, b, t, job.scale, out);
}

// Key and value of one new token and group go into the cache.
void fill_cache(const fewbits::Attention& job, int64_t b, int64_t g, int64_t t) {
  const float* token = job.qkv + (b * job.T + t) * job.stride;
  float* key = job.keys + b * job.key_batch + g * job.key_head + (job.past + t) * job.D;
  float* value = job.values + b * job.value_batch + g * job.value_head + (job.past + t) * job.D;
  prepare_head(job, token + (job.Q + g) * job.D, job.k_norm, b, t, 1.0f, key);
  std::memcpy(value, token + (job.Q + job.G + g) * job.D, static_cast<size_t>(job.D) * sizeof(float));
}

// Those of token and group [begin, end), counted group by group.
void fill_caches(const fewbits::Attention& job, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const int64_t t = index % job.T, group = index / job.T;
    fill_cache(job, group / job.G, group % job.G, t);
  }
}

// scores[j] = query · key j; four keys at a time, so that their sums overlap.
void score_chunk(const float* query, const float* keys, int64_t D, int64_t count, float* scores) {
  const int64_t whole = D / kWidth * kWidth;
  for (int64_t j = 0; j < count; j += 4) {
    const int64_t here = std::min<int64_t>(4, count - j);
    const float* key[4];
    for (int64_t i = 0; i < 4; ++i) key[i] = keys + (j + (i < here ? i : 0)) * D;
    FloatLanes sums[4] = {};
    for (int64_t d = 0; d < whole; d += kWidth) {
      const FloatLanes q = load(query + d);
      for (int64_t i = 0; i < 4; ++i) sums[i] = fused(q, load(key[i] + d), sums[i]);
    }
    for (int64_t i = 0; i < here; ++i) {
      float score = sum_of(sums[i]);
      for (int64_t d = whole; d < D; ++d) score += query[d] * key[i][d];
      scores[j + i] = score;
    }
  }
}

// sums = sums · factor + Σ weight_j · value_j.
void add_values(const float* weights, const float* values, int64_t D, int64_t count, float factor, float* sums) {
  constexpr int64_t kWide = 4 * kWidth;
  int64_t d = 0;
  for (; d + kWide <= D; d += kWide) {
    FloatLanes sum[4];
    for (int64_t i = 0; i < 4; ++i) sum[i] = load(sums + d + i * kWidth) * factor;
    for (int64_t j = 0; j < count; ++j)
      for (int64_t i = 0; i < 4; ++i) sum[i] = fused(all(weights[j]), load(values + j * D + d + i * kWidth), sum[i]);
    for (int64_t i = 0; i < 4; ++i) store(sums + d + i * kWidth, sum[i]);
  }
  for (; d < D; ++d) {
    float sum = sums[d] * factor;
    for (int64_t j = 0; j < count; ++j) sum += weights[j] * values[j * D + d];
    sums[d] = sum;
  }
}

// Scores of `padded` positions (a multiple of kWidth, −Inf beyond the last) become e^(score − largest); returns by
// what earlier sums are to be multiplied. NaN scores become NaN weights; a row that saw nothing yet has weights of 0.
float to_weights(float* scores, int64_t padded, float& largest, float& total) {
  FloatLanes most = all(largest);
  for (int64_t j = 0; j < padded; j += kWidth) most = larger(load(scores + j), most);
  const float now = largest_of(most), base = now == kMinusInf ? 0.0f : now;
  const float factor = largest == kMinusInf ? 0.0f : std::exp(largest - base);
  FloatLanes sum{};
  for (int64_t j = 0; j < padded; j += kWidth) {
    const FloatLanes weight = exponential(load(scores + j) - base);
    store(scores + j, weight);
    sum += weight;
  }
  total = total * factor + sum_of(sum);
  largest = now;
  return factor;
}

void hide_masked(const uint8_t* mask, int64_t count, float* scores) {
  for (int64_t j = 0; j < count; ++j) scores[j] = mask[j] ? scores[j] : kMinusInf;
}

// Positions [from, to) of one text and group, for all its queries. `scratch` holds (rows + 1) · D + kChunk floats.
void attend_few(const fewbits::Attention& job, int64_t b, int64_t g, int64_t from, int64_t to, float* scratch,
                const fewbits::Partial& partial) {
  const int64_t D = job.D, rows = job.rows(), repeats = job.Q / job.G;
  alignas(64) float scores[kChunk];
  for (int64_t r = 0; r < rows; ++r) {
    prepare_query(job, b, g, r, scratch + r * D);
    partial.largest[r] = kMinusInf;
    partial.total[r] = 0;
  }
  std::memset(partial.sums, 0, static_cast<size_t>(rows * D) * sizeof(float));
  const float* keys = job.keys + b * job.key_batch + g * job.key_head;
  const float* values = job.values + b * job.value_batch + g * job.value_head;
  for (int64_t start = from; start < to; start += kChunk) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t t = r / repeats, count = std::min({kChunk, to - start, job.limit(t) - start});
      if (count <= 0) continue;
      score_chunk(scratch + r * D, keys + start * D, D, count, scores);
      if (job.mask) hide_masked(job.mask_of(b, t) + start, count, scores);
      const int64_t padded = (count + kWidth - 1) / kWidth * kWidth;
      for (int64_t j = count; j < padded; ++j) scores[j] = kMinusInf;
      const float factor = to_weights(scores, padded, partial.largest[r], partial.total[r]);
      add_values(scores, values + start * D, D, count, factor, partial.sums + r * D);
    }
  }
}

// out [D] = the attention of row r, from `count` partial results; 0 where nothing was visible.
void merge_partials(const fewbits::Partial* partials, int64_t count, int64_t r, int64_t D, float* out) {
  float largest = kMinusInf, total = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, partials[i].largest[r]);
  for (int64_t d = 0; d < D; ++d) out[d] = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float mine = partials[i].largest[r];
    const float factor = mine == kMinusInf ? 0.0f : std::exp(mine - largest);
    total += partials[i].total[r] * factor;
    for (int64_t d = 0; d < D; ++d) out[d] += partials[i].sums[r * D + d] * factor;
  }
  const float inverse = total == 0 ? 0.0f : 1.0f / total;
  for (int64_t d = 0; d < D; ++d) out[d] *= inverse;
}

}  // namespace
