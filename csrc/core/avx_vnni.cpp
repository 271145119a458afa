// 256-bit VNNI in its VEX encoding: desktop and E-core CPUs that have no AVX-512 (vnni256_impl.h has the kernel).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "isa.h"
#include "kernels.h"

// The core test compiles this file a second time with the EVEX encoding, under another name.
#ifdef OCSQ_VNNI256_EVEX
#define OCSQ_DPBUSD _mm256_dpbusd_epi32
#define OCSQ_DPWSSD _mm256_dpwssd_epi32
#define OCSQ_VNNI256_TABLE kAvx512VlVnni
#define OCSQ_VNNI256_NAME "avx512vl_vnni"
OCSQ_TARGET_BEGIN("avx2,avx512f,avx512bw,avx512vl,avx512vnni")
#else
#define OCSQ_DPBUSD _mm256_dpbusd_avx_epi32
#define OCSQ_DPWSSD _mm256_dpwssd_avx_epi32
#define OCSQ_VNNI256_TABLE kAvxVnni
#define OCSQ_VNNI256_NAME "avx_vnni"
OCSQ_TARGET_BEGIN("avx2,avxvnni")
#endif
#include "simd_avx2.h"
//
#include "kernels_impl.h"
#include "vnni256_impl.h"
OCSQ_TARGET_END

namespace ocsquant {
extern const Kernels OCSQ_VNNI256_TABLE;
const Kernels OCSQ_VNNI256_TABLE = kernels<Tile>(OCSQ_VNNI256_NAME);
}  // namespace ocsquant
#endif
