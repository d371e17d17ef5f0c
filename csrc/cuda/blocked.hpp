// Matrices as Hopper's copy engine and tensor cores want them: blocks of 128 rows of 128 bytes, one after the other
// along a row of blocks. The 16-byte pieces of row r of a block are exchanged by r % 8, so that no eight rows that are
// read together share a bank ("128-byte swizzle").
//
// One block is a tile's step whether its rows or its columns are summed over: scores sum over the columns of packed
// rows, gradients over rows. So one copy of the rows serves every product, and a strip of weights both of its own.
#pragma once

#include "cuda/number.hpp"

namespace nearfar {
inline namespace device {

/// Of 16-bit numbers, 64 columns; or of float32, 32 columns in two pieces, one block behind the other: the number
/// rounded to tf32 and what is left, rounded too.
template <class E>
struct Blocks {
  static constexpr int kPieces = sizeof(E) / 2, kWide = 16 / sizeof(E);
  static constexpr int64_t kRows = 128, kColumns = 8 * kWide, kPiece = kRows * kColumns, kBlock = kPieces * kPiece;
  static constexpr int kBytes = static_cast<int>(kBlock * sizeof(E));
  E* data = nullptr;
  int64_t across = 0;  // blocks in a row of blocks

  static int64_t size(int64_t rows, int64_t columns) { return round_up(rows, kRows) * round_up(columns, kColumns); }
  /// Where element (r, c) of a block lies in it.
  NEARFAR_DEVICE static int within(int r, int c) {
    return r * static_cast<int>(kColumns) + ((c / kWide ^ r % 8) * kWide + c % kWide);
  }
  /// The block of row block `down`, column block `right`.
  NEARFAR_DEVICE E* block(int64_t down, int64_t right) const { return data + (down * across + right) * kBlock; }
  NEARFAR_DEVICE E* at(int64_t row, int64_t column) const {
    return block(row / kRows, column / kColumns) +
           within(static_cast<int>(row % kRows), static_cast<int>(column % kColumns));
  }
};
using Blocked = Blocks<uint16_t>;  // the bits of bfloat16 or float16: who multiplies them knows which
using SplitBlocked = Blocks<float>;

}  // namespace device
}  // namespace nearfar
