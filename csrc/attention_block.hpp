// Attention of many queries: blocks of queries that share a key head, by blocks of positions, as products of matrices.
//
// The ladder, per core
//   1  attention.hpp's one query at a time: limited by L1 and by sums across lanes
//   2  keys transposed once a block, 6 rows × 4 vectors of sums in registers
//   3  blocks that a causal mask or a mask of zeros hides are not computed
//
// Included once per instruction set, hence the anonymous namespace.
#pragma once

#include "attention.hpp"

namespace {

constexpr int64_t kBlock = 256;  // positions: keys transposed are 64 KiB at 64 channels, in L2
constexpr int64_t kRows = 6;  // 6 × 4 vectors of sums, 4 of the right factor and 1 of the left fill 29 of 32 registers

// sums [Rows, Vectors · kWidth] += a [Rows, depth] · b [depth, …].
template <int Rows, int Vectors>
inline void add_product(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, float* out,
                        int64_t out_stride) {
  FloatLanes sums[Rows][Vectors];
  for (int r = 0; r < Rows; ++r)
    for (int i = 0; i < Vectors; ++i) sums[r][i] = load(out + r * out_stride + i * kWidth);
  for (int64_t k = 0; k < depth; ++k) {
    FloatLanes right[Vectors];
    for (int i = 0; i < Vectors; ++i) right[i] = load(b + k * b_stride + i * kWidth);
    for (int r = 0; r < Rows; ++r) {
      const FloatLanes left = all(a[r * a_stride + k]);
      for (int i = 0; i < Vectors; ++i) sums[r][i] = fused(left, right[i], sums[r][i]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int i = 0; i < Vectors; ++i) store(out + r * out_stride + i * kWidth, sums[r][i]);
}

template <int Rows>
void add_columns(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, float* out,
                 int64_t out_stride, int64_t columns) {
  constexpr int64_t kWide = 4 * kWidth;
  int64_t n = 0;
  for (; n + kWide <= columns; n += kWide)
    add_product<Rows, 4>(a, a_stride, b + n, b_stride, depth, out + n, out_stride);
  for (; n < columns; n += kWidth) add_product<Rows, 1>(a, a_stride, b + n, b_stride, depth, out + n, out_stride);
}

// `columns` is a multiple of kWidth.
void add_rows(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, float* out,
              int64_t out_stride, int64_t columns, int64_t rows) {
  switch (rows) {
    case 1:
      return add_columns<1>(a, a_stride, b, b_stride, depth, out, out_stride, columns);
    case 2:
      return add_columns<2>(a, a_stride, b, b_stride, depth, out, out_stride, columns);
    case 3:
      return add_columns<3>(a, a_stride, b, b_stride, depth, out, out_stride, columns);
    case 4:
      return add_columns<4>(a, a_stride, b, b_stride, depth, out, out_stride, columns);
    case 5:
      return add_columns<5>(a, a_stride, b, b_stride, depth, out, out_stride, columns);
    case 6:
      return add_columns<6>(a, a_stride, b, b_stride, depth, out, out_stride, columns);
  }
}

int64_t padded_head(const fewbits::Attention& job) { return (job.D + kWidth - 1) / kWidth * kWidth; }

// Tokens in a block of queries: enough that transposing the keys costs little beside the products.
int64_t block_tokens(const fewbits::Attention& job) { return std::max<int64_t>(8, 192 / (job.Q / job.G)); }

int64_t attention_units(const fewbits::Attention& job) {
  return job.B * job.G * ((job.T + block_tokens(job) - 1) / block_tokens(job));
}

int64_t attention_scratch(const fewbits::Attention& job) {
  const int64_t rows = block_tokens(job) * (job.Q / job.G), wide = padded_head(job);
  return rows * (job.D + wide + 2) + kBlock * (job.D + wide + kRows);
}

// The positions of a block that any of rows [first, last) may see, counted from its start.
int64_t visible(const fewbits::Attention& job, int64_t b, int64_t first, int64_t last, int64_t start) {
  const int64_t count = std::min(kBlock, job.limit(last) - start);
  if (!job.mask || count <= 0) return count;
  for (int64_t t = first; t <= last; ++t)
    for (int64_t j = 0; j < count; ++j)
      if (job.mask_of(b, t)[start + j]) return count;
  return 0;
}

struct BlockScratch {
  float *queries, *sums, *largest, *total, *keys, *values, *scores;
};

// Rows [row, row + count) of a block, at most kRows, by one block of positions.
void attend_rows(const fewbits::Attention& job, int64_t b, int64_t token, int64_t row, int64_t count, int64_t start,
                 const float* values, int64_t value_stride, const BlockScratch& s) {
  const int64_t D = job.D, wide = padded_head(job), repeats = job.Q / job.G;
  const int64_t first = token + row / repeats, last = token + (row + count - 1) / repeats;
  const int64_t seen = visible(job, b, first, last, start);
  if (seen <= 0) return;
  const int64_t padded = (seen + kWidth - 1) / kWidth * kWidth;
  for (int64_t r = 0; r < count; ++r)
    std::memset(s.scores + r * kBlock, 0, static_cast<size_t>(padded) * sizeof(float));
  add_rows(s.queries + row * D, D, s.keys, kBlock, D, s.scores, kBlock, padded, count);
  for (int64_t r = 0; r < count; ++r) {
    const int64_t t = token + (row + r) / repeats;
    float* scores = s.scores + r * kBlock;
    if (job.mask) hide_masked(job.mask_of(b, t) + start, seen, scores);
    for (int64_t j = std::max<int64_t>(0, std::min(seen, job.limit(t) - start)); j < padded; ++j) scores[j] = kMinusInf;
    const float factor = to_weights(scores, padded, s.largest[row + r], s.total[row + r]);
    float* sums = s.sums + (row + r) * wide;
    if (factor != 1.0f)
      for (int64_t d = 0; d < wide; d += kWidth) store(sums + d, load(sums + d) * factor);
  }
  // What all rows see is one product. The rest each row adds for itself: a weight of 0 would not hide a value of NaN.
  const int64_t common = job.mask ? seen : std::clamp<int64_t>(job.limit(first) - start, 0, seen);
  add_rows(s.scores, kBlock, values, value_stride, common, s.sums + row * wide, wide, wide, count);
  for (int64_t r = 0; r < count; ++r) {
    const int64_t own = std::clamp<int64_t>(job.limit(token + (row + r) / repeats) - start, common, seen);
    add_rows(s.scores + r * kBlock + common, kBlock, values + common * value_stride, value_stride, own - common,
             s.sums + (row + r) * wide, wide, wide, 1);
  }
}

// One unit: a block of queries of one text and group; later ones, which see more, come first.
void attend_block(const fewbits::Attention& job, int64_t unit, float* scratch) {
  const int64_t D = job.D, wide = padded_head(job), repeats = job.Q / job.G;
  const int64_t groups = job.B * job.G, size = block_tokens(job), blocks = (job.T + size - 1) / size;
  const int64_t b = unit % groups / job.G, g = unit % job.G, token = (blocks - 1 - unit / groups) * size;
  const int64_t rows = std::min(size, job.T - token) * repeats, most = size * repeats;
  BlockScratch s{};
  float** const parts[] = {&s.queries, &s.sums, &s.largest, &s.total, &s.keys, &s.values, &s.scores};
  const int64_t sizes[] = {most * D, most * wide, most, most, kBlock * D, kBlock * wide, kBlock * kRows};
  for (int i = 0; i < 7; ++i, scratch += sizes[i - 1]) *parts[i] = scratch;
  for (int64_t r = 0; r < rows; ++r) {
    prepare_query(job, b, g, token * repeats + r, s.queries + r * D);
    s.largest[r] = kMinusInf;
    s.total[r] = 0;
  }
  std::memset(s.sums, 0, static_cast<size_t>(rows * wide) * sizeof(float));
  const bool as_they_are = job.type == fewbits::CacheType::kFloat32 && job.values.token == D && wide == D;
  const int64_t end = job.limit(token + (rows - 1) / repeats);
  for (int64_t start = 0; start < end; start += kBlock) {
    const int64_t count = std::min(kBlock, end - start);
    of_type(job, job.keys, b, g, [&](const auto* keys, const float* scales) {
      read_tokens(keys + start * job.keys.token, scales ? scales + start : nullptr, job.keys.token, count, D, s.keys, 1,
                  kBlock);
    });
    for (int64_t d = 0; count < kBlock && d < D; ++d)
      std::memset(s.keys + d * kBlock + count, 0, static_cast<size_t>(kBlock - count) * sizeof(float));
    const float* block = s.values;
    if (as_they_are) {
      block = static_cast<const float*>(job.values.data) + b * job.values.batch + g * job.values.head + start * D;
    } else {
      if (wide != D) std::memset(s.values, 0, static_cast<size_t>(kBlock * wide) * sizeof(float));
      of_type(job, job.values, b, g, [&](const auto* values, const float* scales) {
        read_tokens(values + start * job.values.token, scales ? scales + start : nullptr, job.values.token, count, D,
                    s.values, wide, 1);
      });
    }
    for (int64_t r = 0; r < rows; r += kRows)
      attend_rows(job, b, token, r, std::min(kRows, rows - r), start, block, wide, s);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float inverse = s.total[r] == 0 ? 0.0f : 1.0f / s.total[r];
    const int64_t m = b * job.T + token + r / repeats, head = g * repeats + r % repeats;
    for (int64_t d = 0; d < D; ++d) job.out[(m * job.Q + head) * D + d] = s.sums[r * wide + d] * inverse;
  }
}

}  // namespace
