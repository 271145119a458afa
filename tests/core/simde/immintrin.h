// Stands in front of the compiler's <immintrin.h> so that the AVX-512 sources compile to AVX2 code through SIMDe: their
// logic is then tested on a machine without AVX-512. Below is what SIMDe 0.7.4 lacks, lane by lane as Intel's guide
// words it. Nothing here is meant to be fast.
#pragma once
#include_next <immintrin.h>  // SIMDe builds 256-bit operations on the real ones
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <cmath>
#include <cstdlib>
#include <cstring>

// The compiler has its own 512-bit types, of another kind than SIMDe's.
#define __m512 simde__m512
#define __m512i simde__m512i
#define __mmask16 simde__mmask16
#define __mmask32 simde__mmask32

// The VEX and the EVEX encoding of one instruction.
#undef _mm256_dpbusd_avx_epi32
#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32

namespace shim {

inline simde__m512 to_float(simde__m512i v) {
  const simde__m512i_private in = simde__m512i_to_private(v);
  simde__m512_private out;
  for (int i = 0; i < 16; ++i) out.f32[i] = static_cast<float>(in.i32[i]);
  return simde__m512_from_private(out);
}

inline simde__m512i to_int(simde__m512 v) {
  const simde__m512_private in = simde__m512_to_private(v);
  simde__m512i_private out;
  for (int i = 0; i < 16; ++i) {
    const float r = std::nearbyint(in.f32[i]);
    out.i32[i] = r >= -0x1p31f && r < 0x1p31f ? static_cast<int32_t>(r) : INT32_MIN;  // "integer indefinite"
  }
  return simde__m512i_from_private(out);
}

inline int32_t largest(simde__m512i v) {
  const simde__m512i_private in = simde__m512i_to_private(v);
  int32_t out = in.i32[0];
  for (int i = 1; i < 16; ++i) out = in.i32[i] > out ? in.i32[i] : out;
  return out;
}

inline int32_t total(simde__m512i v) {
  const simde__m512i_private in = simde__m512i_to_private(v);
  uint32_t out = 0;
  for (int i = 0; i < 16; ++i) out += static_cast<uint32_t>(in.i32[i]);
  return static_cast<int32_t>(out);
}

inline simde__m512i widen_u8(simde__m128i v) {
  const simde__m128i_private in = simde__m128i_to_private(v);
  simde__m512i_private out;
  for (int i = 0; i < 16; ++i) out.u32[i] = in.u8[i];
  return simde__m512i_from_private(out);
}

inline simde__m512i widen_u16(simde__m256i v) {
  const simde__m256i_private in = simde__m256i_to_private(v);
  simde__m512i_private out;
  for (int i = 0; i < 16; ++i) out.u32[i] = in.u16[i];
  return simde__m512i_from_private(out);
}

inline simde__m256i truncate_to_i16(simde__m512i v) {
  const simde__m512i_private in = simde__m512i_to_private(v);
  simde__m256i_private out;
  for (int i = 0; i < 16; ++i) out.u16[i] = static_cast<uint16_t>(in.u32[i]);
  return simde__m256i_from_private(out);
}

inline uint32_t greater_i16(simde__m512i a, simde__m512i b) {
  const simde__m512i_private x = simde__m512i_to_private(a), y = simde__m512i_to_private(b);
  uint32_t out = 0;
  for (int i = 0; i < 32; ++i) out |= static_cast<uint32_t>(x.i16[i] > y.i16[i]) << i;
  return out;
}

// These read nothing of what is masked out.
inline simde__m512i load_some_i16(uint32_t mask, const int16_t* p) {
  simde__m512i_private out;
  for (int i = 0; i < 32; ++i) out.i16[i] = mask >> i & 1 ? p[i] : 0;
  return simde__m512i_from_private(out);
}

inline simde__m512 load_some(simde__m512 rest, simde__mmask16 mask, const float* p) {
  simde__m512_private out = simde__m512_to_private(rest);
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) out.f32[i] = p[i];
  }
  return simde__m512_from_private(out);
}

// AMX: eight tiles of 16 rows of 64 bytes, as the kernels configure them.
struct Tiles {
  uint8_t bytes[8][16][64];
  bool configured = false;
};
inline thread_local Tiles g_tiles;

inline uint8_t (*tile(int t))[64] {
  if (!g_tiles.configured) std::abort();
  return g_tiles.bytes[t];
}

inline void load_tile(int t, const void* from, int64_t pitch) {
  for (int i = 0; i < 16; ++i) std::memcpy(tile(t)[i], static_cast<const uint8_t*>(from) + i * pitch, 64);
}

inline void store_tile(int t, void* to, int64_t pitch) {
  for (int i = 0; i < 16; ++i) std::memcpy(static_cast<uint8_t*>(to) + i * pitch, tile(t)[i], 64);
}

inline void add_products(int t, int a, int b) {
  for (int m = 0; m < 16; ++m) {
    uint32_t sums[16];
    std::memcpy(sums, tile(t)[m], 64);
    for (int k = 0; k < 64; ++k) {
      const int x = static_cast<int8_t>(tile(a)[m][k]);
      for (int n = 0; n < 16; ++n) sums[n] += static_cast<uint32_t>(x * tile(b)[k / 4][4 * n + k % 4]);
    }
    std::memcpy(tile(t)[m], sums, 64);
  }
}

}  // namespace shim

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud
#define _tile_loadconfig(config) (shim::g_tiles.configured = *reinterpret_cast<const uint8_t*>(config) == 1)
#define _tile_release() (shim::g_tiles = {})
#define _tile_zero(t) std::memset(shim::tile(t), 0, sizeof(shim::g_tiles.bytes[t]))
#define _tile_loadd shim::load_tile
#define _tile_stored shim::store_tile
#define _tile_dpbsud shim::add_products
#define _mm512_cvtepi32_ps shim::to_float
#define _mm512_mask_loadu_ps shim::load_some
#define _mm512_cvtps_epi32 shim::to_int
#define _mm512_reduce_max_epi32 shim::largest
#define _mm512_reduce_add_epi32 shim::total
#undef _mm512_cvtepu8_epi32
#define _mm512_cvtepu8_epi32 shim::widen_u8
#define _mm512_cvtepu16_epi32 shim::widen_u16
#define _mm512_cvtepi32_epi16 shim::truncate_to_i16
#undef _mm512_cmpgt_epi16_mask
#define _mm512_cmpgt_epi16_mask shim::greater_i16
#undef _mm512_maskz_loadu_epi16
#define _mm512_maskz_loadu_epi16 shim::load_some_i16
