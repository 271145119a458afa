// One layer and direction of an LSTM or GRU over all its steps: what the input adds to the gates is given, what the
// last output adds is an integer linear, quantized token by token.
#include <algorithm>
#include <cstring>
#include <string>
#include <tuple>

#include "linear.h"

namespace ocsquant {
namespace {

constexpr int64_t kSerialUnits = 16'384;  // of a step: below, a second thread costs more than it brings

// Rows of each step, first sequences first: a step has as many rows as sequences are that long.
struct Step {
  int64_t first, rows;
};

std::vector<Step> steps_of(const char* op, const std::optional<Tensor>& batch_sizes, int64_t rows, int64_t batch,
                           bool reverse) {
  std::vector<Step> steps;
  if (batch_sizes.has_value()) {
    check_tensor(op, "batch_sizes", *batch_sizes, ScalarType::Long, 1);
    const Tensor sizes = dense(*batch_sizes);
    const int64_t* size = sizes.const_data_ptr<int64_t>();
    int64_t first = 0, last = batch;
    for (int64_t t = 0; t < sizes.numel(); ++t) {
      OCSQ_CHECK(size[t] > 0 && size[t] <= last && (t > 0 || size[t] == batch), op,
                 ": batch_sizes must start with the ", batch, " rows of h, be positive and not increase, got ", size[t],
                 " at ", t);
      steps.push_back({first, size[t]});
      first += last = size[t];
    }
    OCSQ_CHECK(first == rows, op, ": batch_sizes must have the ", rows, " rows of gates as its sum, got ", first);
  } else {
    OCSQ_CHECK(batch > 0 ? rows % batch == 0 : rows == 0, op, ": gates must have a multiple of ", batch,
               " rows, as h has, got ", rows);
    for (int64_t first = 0; first < rows; first += batch) steps.push_back({first, batch});
  }
  if (reverse) std::reverse(steps.begin(), steps.end());
  return steps;
}

void check_matrix(const char* op, const char* name, const Tensor& t, int64_t rows, int64_t columns) {
  check_tensor(op, name, t, ScalarType::Float, 2);
  OCSQ_CHECK((rows < 0 || t.size(0) == rows) && t.size(1) == columns, op, ": ", name, " must have ", columns,
             " columns", rows < 0 ? "" : " and as many rows as h", ", got [", t.size(0), ", ", t.size(1), "]");
}

Tensor copy_of(const Tensor& t) {
  const Tensor from = dense(t);
  Tensor copy = empty_cpu(sizes_of(t), t.scalar_type());
  std::memcpy(copy.mutable_data_ptr(), from.const_data_ptr(), from.numel() * sizeof(float));
  return copy;
}

// cell(row of gates, what the last output adds, which sequence) for the rows of a step, then out(first, rows).
template <class Cell, class Out>
void run_steps(const std::vector<Step>& steps, const float* gates, const TokenQuantizer& how, const PackedWeight& w,
               int64_t batch, int64_t hidden, const float* h, const Cell& cell, const Out& out) {
  const Buffer buffer(batch * w.n * sizeof(float));
  float* recurrent = buffer.at<float>(0);
  for (const Step& step : steps) {
    run_linear(h, Float::f32, step.rows, how, w, recurrent);
    const int64_t threads = torch::stable::get_num_threads();
    parallel_chunks(step.rows, step.rows * hidden > kSerialUnits ? std::min(threads, step.rows) : 1,
                    [&](int64_t, int64_t first, int64_t last) {
                      for (int64_t i = first; i < last; ++i) {
                        cell(gates + (step.first + i) * w.n, recurrent + i * w.n, i);
                      }
                    });
    out(step.first, step.rows);
  }
}

// The texts of a check speak of "op: argument"; those of the projection have a longer name.
template <class Check>
void check_projection(const std::string& op, const Check& check) {
  try {
    check();
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(op + ": projection_" + (error.what() + op.size() + 2));
  }
}

std::tuple<Tensor, Tensor, Tensor> quantized_lstm(
    const Tensor& gates, const Tensor& h, const Tensor& c, const Tensor& packed, const Tensor& scale,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& tail_index, int64_t bits, int64_t max_outliers,
    double threshold, int64_t group_size, int64_t weight_bits, const std::optional<Tensor>& zero,
    const std::optional<Tensor>& levels, const std::optional<Tensor>& batch_sizes, bool reverse,
    const std::optional<Tensor>& projection_packed, const std::optional<Tensor>& projection_scale,
    const std::optional<Tensor>& projection_tail_index, int64_t projection_group_size, int64_t projection_weight_bits,
    const std::optional<Tensor>& projection_zero, const std::optional<Tensor>& projection_levels) {
  constexpr const char* kOp = "quantized_lstm";
  const TokenQuantizer how = check_quantizer(kOp, bits, max_outliers, threshold);
  check_tensor(kOp, "h", h, ScalarType::Float, 2);
  const int64_t batch = h.size(0), outputs = h.size(1);
  const LinearWeight weight(kOp, {packed, scale, bias, tail_index, {weight_bits, zero, levels, group_size}}, outputs);
  const PackedWeight& w = weight.weight();
  const int64_t hidden = w.n / 4;
  OCSQ_CHECK(w.n % 4 == 0, kOp, ": scale must have 4 gates of one size, got ", w.n, " outputs");
  check_matrix(kOp, "gates", gates, -1, w.n);
  check_matrix(kOp, "c", c, batch, hidden);
  OCSQ_CHECK(projection_packed.has_value() == projection_scale.has_value(), kOp,
             ": projection_packed and projection_scale must be given together");
  OCSQ_CHECK(projection_packed.has_value() || outputs == hidden, kOp, ": h must have ", hidden,
             " columns without a projection, got ", outputs);
  std::optional<LinearWeight> project;
  if (projection_packed.has_value()) {
    const std::optional<Tensor> none;
    const Storage storage = {projection_weight_bits, projection_zero, projection_levels, projection_group_size};
    check_projection(kOp, [&] {
      project.emplace(kOp, WeightOperands{*projection_packed, *projection_scale, none, projection_tail_index, storage},
                      hidden);
    });
    OCSQ_CHECK(project->weight().n == outputs, kOp, ": projection_scale must have ", outputs,
               " entries, the columns of h, got ", project->weight().n);
  }
  const std::vector<Step> steps = steps_of(kOp, batch_sizes, gates.size(0), batch, reverse);
  Tensor y = empty_cpu({gates.size(0), outputs}, ScalarType::Float), state = copy_of(h), cell = copy_of(c);
  const Tensor dense_gates = dense(gates);
  const Buffer buffer(project ? batch * hidden * sizeof(float) : 0);
  float *ys = y.mutable_data_ptr<float>(), *hs = state.mutable_data_ptr<float>(), *cs = cell.mutable_data_ptr<float>();
  float* units = project ? buffer.at<float>(0) : hs;
  const auto one = cpu_kernels().recurrent.lstm_cell;
  run_steps(
      steps, dense_gates.const_data_ptr<float>(), how, w, batch, hidden, hs,
      [&](const float* x, const float* r, int64_t i) { one(x, r, hidden, cs + i * hidden, units + i * hidden); },
      [&](int64_t first, int64_t rows) {
        if (project) run_linear(units, Float::f32, rows, how, project->weight(), hs);
        std::memcpy(ys + first * outputs, hs, rows * outputs * sizeof(float));
      });
  return {y, state, cell};
}

std::tuple<Tensor, Tensor> quantized_gru(const Tensor& gates, const Tensor& h, const Tensor& packed,
                                         const Tensor& scale, const std::optional<Tensor>& bias,
                                         const std::optional<Tensor>& tail_index, int64_t bits, int64_t max_outliers,
                                         double threshold, int64_t group_size, int64_t weight_bits,
                                         const std::optional<Tensor>& zero, const std::optional<Tensor>& levels,
                                         const std::optional<Tensor>& batch_sizes, bool reverse) {
  constexpr const char* kOp = "quantized_gru";
  const TokenQuantizer how = check_quantizer(kOp, bits, max_outliers, threshold);
  check_tensor(kOp, "h", h, ScalarType::Float, 2);
  const int64_t batch = h.size(0), hidden = h.size(1);
  const LinearWeight weight(kOp, {packed, scale, bias, tail_index, {weight_bits, zero, levels, group_size}}, hidden);
  const PackedWeight& w = weight.weight();
  OCSQ_CHECK(w.n == 3 * hidden, kOp, ": h must have a third of the ", w.n, " outputs as columns, got ", hidden);
  check_matrix(kOp, "gates", gates, -1, w.n);
  const std::vector<Step> steps = steps_of(kOp, batch_sizes, gates.size(0), batch, reverse);
  Tensor y = empty_cpu({gates.size(0), hidden}, ScalarType::Float), state = copy_of(h);
  const Tensor dense_gates = dense(gates);
  float *ys = y.mutable_data_ptr<float>(), *hs = state.mutable_data_ptr<float>();
  const auto one = cpu_kernels().recurrent.gru_cell;
  run_steps(
      steps, dense_gates.const_data_ptr<float>(), how, w, batch, hidden, hs,
      [&](const float* x, const float* r, int64_t i) { one(x, r, hidden, hs + i * hidden); },
      [&](int64_t first, int64_t rows) { std::memcpy(ys + first * hidden, hs, rows * hidden * sizeof(float)); });
  return {y, state};
}

STABLE_TORCH_LIBRARY_IMPL(ocsquant, CPU, m) {
  m.impl("quantized_lstm", TORCH_BOX(&quantized_lstm));
  m.impl("quantized_gru", TORCH_BOX(&quantized_gru));
}

}  // namespace
}  // namespace ocsquant
