// AMX: tiles of 16 rows x 64 bytes in registers of their own. The packed weights serve as they are, 16 groups of 16
// columns a tile, and so do the rows of codes.
//
//   tdpbsud   16 rows x 16 columns x 64 channels: signed activation byte times unsigned weight byte, summed into int32
//
// Fewer than 16 rows, the last groups where they fill no tile, quantization and everything else are AVX-512's.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "isa.h"
#include "kernels.h"

OCSQ_TARGET_BEGIN("avx2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,amx-tile,amx-int8")
#include "simd_avx512.h"
//
#include "kernels_impl.h"
#include "vnni512_impl.h"

namespace ocsquant {
namespace {

constexpr int kTileRows = 16, kTileGroups = 16;

// What ldtilecfg reads: every tile has 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kTileConfig;
static_assert(sizeof(TileConfig) == 64);

struct AmxTile : Tile {
  static constexpr int kRows = 2 * kTileRows;

  // With enough rows, bytes are unpacked once for all.
  static bool unpacks(const uint8_t*, int64_t rows) { return rows < kTileRows; }

  static void multiply(int count, const uint8_t* tile, int64_t depth, const Block& block, int32_t* sums) {
    const int64_t whole = block.bits == 8 ? block.groups / kTileGroups * kTileGroups : 0, pitch = row_bytes(depth);
    const int done = whole == 0 ? 0 : count / kTileRows * kTileRows;
    const uint8_t* codes = tile + block.first_group * kGroup;
    if (done == kRows) {
      two(codes, pitch, block, whole, sums);
    } else if (done > 0) {
      one(codes, pitch, block, whole, sums);
    }
    if (done > 0 && whole < block.groups) {
      Block left = block;
      left.weights += whole * kGroupBytes;
      left.first_group += whole;
      left.groups -= whole;
      left.first = false;
      left.next = nullptr;
      by_rows(0, done, tile, depth, left, sums);
    }
    by_rows(done, count, tile, depth, block, sums);
  }

 private:
  static void by_rows(int first, int last, const uint8_t* tile, int64_t depth, const Block& block, int32_t* sums) {
    for (int i = first; i < last; i += Tile::kRows) {
      const int rows = last - i < Tile::kRows ? last - i : Tile::kRows;
      Tile::multiply(rows, tile + i * row_bytes(depth), depth, block, sums + i * kPanel);
    }
  }

  // The intrinsics do not tell the compiler what memory they read.
  static OCSQ_INLINE void written() { asm volatile("" ::: "memory"); }

  static constexpr int64_t kSumsPitch = kPanel * sizeof(int32_t);

  // Tiles 0 to 3.
  static OCSQ_INLINE void load_sums(bool zero, const int32_t* a, const int32_t* b, const int32_t* c, const int32_t* d) {
    if (zero) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, a, kSumsPitch);
      _tile_loadd(1, b, kSumsPitch);
      _tile_loadd(2, c, kSumsPitch);
      _tile_loadd(3, d, kSumsPitch);
    }
  }
  static OCSQ_INLINE void store_sums(int32_t* a, int32_t* b, int32_t* c, int32_t* d) {
    _tile_stored(0, a, kSumsPitch);
    _tile_stored(1, b, kSumsPitch);
    _tile_stored(2, c, kSumsPitch);
    _tile_stored(3, d, kSumsPitch);
  }

  // 32 rows: two times 32 columns, each loaded tile for two products.
  static __attribute__((noinline)) void two(const uint8_t* codes, int64_t pitch, const Block& block, int64_t groups,
                                            int32_t* sums) {
    written();
    for (int64_t j = 0; j < block.width; j += 32) {
      int32_t *upper = sums + j, *lower = upper + kTileRows * kPanel;
      load_sums(block.first, upper, upper + 16, lower, lower + 16);
      for (int64_t g = 0; g < groups; g += kTileGroups) {
        const uint8_t *a = codes + g * kGroup, *b = block.weights + g * kGroupBytes + j * kGroup;
        _tile_loadd(4, a, pitch);
        _tile_loadd(6, b, kGroupBytes);
        _tile_loadd(7, b + 64, kGroupBytes);
        _tile_loadd(5, a + kTileRows * pitch, pitch);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
      }
      store_sums(upper, upper + 16, lower, lower + 16);
    }
    written();
  }

  // 16 rows: all 64 columns, so that the codes are loaded once.
  static __attribute__((noinline)) void one(const uint8_t* codes, int64_t pitch, const Block& block, int64_t groups,
                                            int32_t* sums) {
    written();
    load_sums(block.first, sums, sums + 16, sums + 32, sums + 48);
    for (int64_t g = 0; g < groups; g += kTileGroups) {
      const uint8_t* b = block.weights + g * kGroupBytes;
      _tile_loadd(4, codes + g * kGroup, pitch);
      _tile_loadd(5, b, kGroupBytes);
      _tile_loadd(6, b + 64, kGroupBytes);
      _tile_dpbsud(0, 4, 5);
      _tile_loadd(7, b + 128, kGroupBytes);
      _tile_dpbsud(1, 4, 6);
      _tile_loadd(5, b + 192, kGroupBytes);
      _tile_dpbsud(2, 4, 7);
      _tile_dpbsud(3, 4, 5);
    }
    store_sums(sums, sums + 16, sums + 32, sums + 48);
    written();
  }
};

using Multiply = decltype(LinearKernels::multiply);

// The tiles are there for this call alone: a thread that keeps them has more to save at every switch.
template <Multiply kMultiply>
void with_tiles(const Activations& a, const PackedWeight& w, void* y, Float dtype, int64_t first, int64_t last,
                int64_t panel, uint8_t* scratch) {
  if (last - first < kTileRows) return kMultiply(a, w, y, dtype, first, last, panel, scratch);
  _tile_loadconfig(&kTileConfig);
  kMultiply(a, w, y, dtype, first, last, panel, scratch);
  _tile_release();
}

constexpr LinearKernels amx_linear_kernels() {
  LinearKernels made = linear_kernels<AmxTile>();
  made.multiply = with_tiles<multiply<AmxTile>>;
  made.multiply_groups = with_tiles<multiply_groups<AmxTile>>;
  return made;
}

}  // namespace
}  // namespace ocsquant
OCSQ_TARGET_END

namespace ocsquant {
namespace {

// Constants: at run time, on a CPU without AVX-512 too, nothing of the target region may run.
constexpr LinearKernels kAmxLinear = amx_linear_kernels();
constexpr ConvolutionKernels kAmxConvolution = convolution_kernels<AmxTile>();

Kernels with_amx(Kernels made) {
  made.isa = "amx_int8";
  made.linear = kAmxLinear;
  made.convolution = kAmxConvolution;
  return made;
}

}  // namespace

const Kernels kAmxInt8 = with_amx(kAvx512Vnni);
}  // namespace ocsquant
#endif
