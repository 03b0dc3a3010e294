// Scratch memory of a call, in one allocation.
#pragma once

#include <cstdint>
#include <memory>

#include "decoder.hpp"

namespace fewbits {

// Room for one thread, or for all: pieces of one allocation, each on a cache line of its own.
class Room {
 public:
  template <class T>
  T* take(int64_t count) {
    const int64_t at = bytes_;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return memory_ ? reinterpret_cast<T*>(start_ + at) : nullptr;
  }
  // After a first round of `take`, which only counts.
  void allocate() {
    memory_.reset(new char[static_cast<size_t>(bytes_ + 64)]);
    start_ = memory_.get() + (64 - reinterpret_cast<uintptr_t>(memory_.get()) % 64) % 64;
    bytes_ = 0;
  }

 private:
  std::unique_ptr<char[]> memory_;
  char* start_ = nullptr;
  int64_t bytes_ = 0;
};

inline Tokens take_tokens(Room& room, const TokenNeeds& needs, int64_t M, int64_t K) {
  Tokens tokens{needs, nullptr, room.take<float>(M), nullptr, M, K};
  tokens.tiles = room.take<uint8_t>(M * tokens.row_bytes());
  if (needs.kind == TokenKind::kInt4) tokens.sums = room.take<int32_t>(M * needs.groups);
  return tokens;
}

}  // namespace fewbits
