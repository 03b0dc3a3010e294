// Heads prepared for attention, and attention of a few queries; attention_block.hpp has that of many.
//
// The ladder, for one query after 512 positions of 9 heads of 64 channels
//   1  each head by itself, over all positions
//   2  the heads of a group together, positions split over threads: the cache is read once
//   3  64 positions at a time: scores, their exponentials, the sum of values, while keys and values are in L1
//   4  four queries at a time, and int8 keys and values decoded in registers (attention_cache.hpp)
//
// Included once per instruction set, hence the anonymous namespace.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention_cache.hpp"
#include "rms_norm.hpp"
#include "vector.hpp"

namespace {

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
  const int64_t t = r / job.repeats(), head = g * job.repeats() + r % job.repeats();
  const float* query = job.queries + b * job.query_batch + t * job.query_token + head * job.query_head;
  prepare_head(job, query, job.q_norm, b, t, job.scale, out);
}

// Keys and values of the new tokens go into the cache: token and group [begin, end), counted group by group.
// `scratch` holds D floats.
void fill_caches(const fewbits::Attention& job, int64_t begin, int64_t end, float* scratch) {
  if (!job.new_keys) return;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t t = index % job.T, g = index / job.T % job.G, b = index / job.T / job.G;
    const int64_t from = b * job.query_batch + t * job.query_token + g * job.query_head;
    prepare_head(job, job.new_keys + from, job.k_norm, b, t, 1.0f, scratch);
    write_token(job, job.keys, b, g, job.past + t, scratch);
    write_token(job, job.values, b, g, job.past + t, job.new_values + from);
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

// Of what a chunk of positions from `start` on is made, for rows that are attended together.
template <class T>
struct Chunk {
  const T *keys, *values;
  const float *key_scales, *value_scales;  // or null
  int64_t start, count;
};

// Rows [first, first + Rows) of a group by one chunk.
template <int Rows, class T>
void attend_chunk(const fewbits::Attention& job, int64_t b, const Chunk<T>& chunk, int64_t first, const float* queries,
                  const fewbits::Partial& partial) {
  const int64_t D = job.D;
  int64_t seen[Rows], most = 0, common = chunk.count;
  for (int r = 0; r < Rows; ++r) {
    seen[r] = std::clamp<int64_t>(job.limit((first + r) / job.repeats()) - chunk.start, 0, chunk.count);
    most = std::max(most, seen[r]);
    common = std::min(common, seen[r]);
  }
  if (most == 0) return;
  alignas(64) float scores[Rows * kChunk];
  float factors[Rows];
  score_keys<Rows>(queries + first * D, D, chunk.keys, job.keys.token, most, scores);
  const int64_t padded = (most + kWidth - 1) / kWidth * kWidth;
  for (int r = 0; r < Rows; ++r) {
    float* of_row = scores + r * kChunk;
    if (chunk.key_scales)
      for (int64_t j = 0; j < most; ++j) of_row[j] *= chunk.key_scales[j];
    if (job.mask) hide_masked(job.mask_of(b, (first + r) / job.repeats()) + chunk.start, seen[r], of_row);
    for (int64_t j = seen[r]; j < padded; ++j) of_row[j] = kMinusInf;
    factors[r] = to_weights(of_row, padded, partial.largest[first + r], partial.total[first + r]);
    if (chunk.value_scales)
      for (int64_t j = 0; j < seen[r]; ++j) of_row[j] *= chunk.value_scales[j];
  }
  // What all rows see they add together, the rest each for itself: a weight of 0 would not hide a value of NaN.
  add_values<Rows>(scores, factors, chunk.values, job.values.token, common, D, partial.sums + first * D);
  const float one = 1.0f;
  for (int r = 0; r < Rows; ++r)
    if (seen[r] > common)
      add_values<1>(scores + r * kChunk + common, &one, chunk.values + common * job.values.token, job.values.token,
                    seen[r] - common, D, partial.sums + (first + r) * D);
}

template <class T>
void attend_chunks(const fewbits::Attention& job, int64_t b, const Chunk<T>& all, int64_t to, const float* queries,
                   const fewbits::Partial& partial) {
  for (int64_t start = all.start; start < to; start += kChunk) {
    const Chunk<T> chunk{all.keys + start * job.keys.token,
                         all.values + start * job.values.token,
                         all.key_scales ? all.key_scales + start : nullptr,
                         all.value_scales ? all.value_scales + start : nullptr,
                         start,
                         std::min(kChunk, to - start)};
    int64_t r = 0;
    for (; r + kRowsAtOnce <= job.rows(); r += kRowsAtOnce)
      attend_chunk<kRowsAtOnce>(job, b, chunk, r, queries, partial);
    for (; r + 2 <= job.rows(); r += 2) attend_chunk<2>(job, b, chunk, r, queries, partial);
    for (; r < job.rows(); ++r) attend_chunk<1>(job, b, chunk, r, queries, partial);
  }
}

// Positions [from, to) of one text and group, for all its queries. `scratch` holds rows · D floats.
void attend_few(const fewbits::Attention& job, int64_t b, int64_t g, int64_t from, int64_t to, float* scratch,
                const fewbits::Partial& partial) {
  const int64_t D = job.D, rows = job.rows();
  for (int64_t r = 0; r < rows; ++r) {
    prepare_query(job, b, g, r, scratch + r * D);
    partial.largest[r] = kMinusInf;
    partial.total[r] = 0;
  }
  std::memset(partial.sums, 0, static_cast<size_t>(rows * D) * sizeof(float));
  of_type(job, job.keys, b, g, [&]<class T>(const T* keys, const float* key_scales) {
    const int64_t at = b * job.values.batch + g * job.values.head;
    const float* value_scales = key_scales ? job.values.scales + at / D : nullptr;
    const T* values = static_cast<const T*>(job.values.data) + at;
    attend_chunks<T>(job, b, {keys, values, key_scales, value_scales, from, 0}, to, scratch, partial);
  });
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
