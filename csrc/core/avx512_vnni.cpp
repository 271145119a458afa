// AVX-512 with VNNI (vnni512_impl.h has the kernel).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "isa.h"
#include "kernels.h"

OCSQ_TARGET_BEGIN("avx2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#include "simd_avx512.h"
//
#include "kernels_impl.h"
#include "vnni512_impl.h"
OCSQ_TARGET_END

namespace ocsquant {
const Kernels kAvx512Vnni = kernels<Tile>("avx512_vnni");
}  // namespace ocsquant
#endif
