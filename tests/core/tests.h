// The tests of the core, one function per subject.
#pragma once
#include <vector>

#include "data.h"
#include "guard.h"
#include "report.h"

namespace coretest {

// every: run one in so many of the small shapes (and a smaller part of the rest), spread evenly.
void test_linear(std::vector<Level>& levels, int64_t every);
void test_convolution(std::vector<Level>& levels, int64_t every);
void test_recurrent(std::vector<Level>& levels);
void test_nonlinearity(std::vector<Level>& levels);
void test_fake_quantize_split(Level& level);
void test_fake_quantize_clip(Level& level);
void test_kurtosis(Level& level);
void test_dequantize(Level& level);
void test_conversions(Level& level);
void test_packing(Level& level);
void test_selection(Level& level, const std::vector<Level>& levels);

}  // namespace coretest
