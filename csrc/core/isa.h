// A region whose functions are compiled for one instruction set. Include every standard header before it:
// code inlined from a header inside the region would be compiled for that set too.
#pragma once

#ifndef OCSQ_TARGET_BEGIN
#define OCSQ_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define OCSQ_TARGET_BEGIN(isa) OCSQ_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define OCSQ_TARGET_END _Pragma("clang attribute pop")
#else
#define OCSQ_TARGET_BEGIN(isa) _Pragma("GCC push_options") OCSQ_PRAGMA(GCC target(isa))
#define OCSQ_TARGET_END _Pragma("GCC pop_options")
#endif
#endif

#define OCSQ_INLINE inline __attribute__((always_inline))
