// Matrices of bfloat16 as Hopper's copy engine and tensor cores want them: blocks of 128 rows x 64 columns, one after
// the other along a row of blocks, each 16 KiB. Row r of a block is 128 bytes, whose 16-byte pieces are exchanged by r
// % 8, so that no eight rows that are read together share a bank ("128-byte swizzle").
//
// One block is a tile's step whether its rows or its columns are summed over: scores sum over the columns of packed
// rows, gradients over rows. So one copy of the rows serves every product, and a strip of weights both of its own.
#pragma once

#include "cuda/number.hpp"

namespace nearfar {
inline namespace device {

struct Blocked {
  static constexpr int64_t kRows = 128, kColumns = 64, kBlock = kRows * kColumns;
  BF16* data = nullptr;
  int64_t across = 0;  // blocks in a row of blocks

  static int64_t size(int64_t rows, int64_t columns) { return round_up(rows, kRows) * round_up(columns, kColumns); }
  /// Where element (r, c) of a block lies in it.
  NEARFAR_DEVICE static int within(int r, int c) { return r * 64 + ((c / 8 ^ r % 8) * 8 + c % 8); }
  /// The block of row block `down`, column block `right`.
  NEARFAR_DEVICE BF16* block(int64_t down, int64_t right) const { return data + (down * across + right) * kBlock; }
  NEARFAR_DEVICE BF16* at(int64_t row, int64_t column) const {
    return block(row / kRows, column / kColumns) +
           within(static_cast<int>(row % kRows), static_cast<int>(column % kColumns));
  }
};

}  // namespace device
}  // namespace nearfar
