// The pass of prediction.h. Maths: spectralx_kernels/upsample/README.md.
//
// A task is a fixed run of source rows of one image and the output rows whose first source is among
// them. It writes the gradient of its own source rows and hands what falls on the row behind its last
// one to an ordered second pass; losses are added up task by task. So the bits of every result are
// the same for any number of threads.
#include "cpu/torch.h"

#include "cpu/upsample/prediction.h"

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

#include "cpu/common/accumulation.h"
#include "cpu/upsample/pixels.h"

namespace spectralx::cpu {
namespace {

using at::Tensor;

template <typename T>
T* data(const Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr<T>() : nullptr;
}

// A source row to [K, stride] in T, its last column once more behind itself.
template <typename T, typename S>
void load_row(const Tensor& logits, int64_t image, int64_t y, int64_t stride, T* to) {
  const S* from = logits.const_data_ptr<S>() + image * logits.stride(0) + y * logits.stride(2);
  const int64_t width = logits.size(3), by_column = logits.stride(3);
  for (int64_t k = 0; k < logits.size(1); ++k, from += logits.stride(1), to += stride) {
    if (by_column == 1) {
      for (int64_t x = 0; x < width; ++x) to[x] = static_cast<T>(from[x]);
    } else {
      for (int64_t x = 0; x < width; ++x) to[x] = static_cast<T>(from[x * by_column]);
    }
    to[width] = to[width - 1];
  }
}

template <typename T>
struct Job {
  PredictionPass& p;
  const PixelKernels<T>& kernels = pixel_kernels<T>();
  Slots<T> slots;
  int64_t batch, classes, height, width, out_height, out_width, stride;
  int64_t run, runs;                // source rows of a task; tasks of an image
  std::vector<int64_t> first_row;   // [runs + 1], of the output
  std::vector<T> class_weight;      // ones where none is given; empty without a target
  T weight_total = 0, smooth_share = 0, hot_share = 1;
  std::vector<double> loss_sums, weight_sums;  // a task
  Tensor carries;                   // [tasks, K, w], gradient of the row behind the task's last
  Tensor class_sums;                // [tasks, 3, K]
  std::mutex merging;

  explicit Job(PredictionPass& pass) : p(pass), slots(pass.columns) {
    batch = p.logits.size(0), classes = p.logits.size(1);
    height = p.logits.size(2), width = p.logits.size(3);
    out_height = static_cast<int64_t>(p.rows.first.size());
    out_width = static_cast<int64_t>(p.columns.first.size());
    stride = (width + 1 + kLanes + kLanes - 1) / kLanes * kLanes;
    run = std::clamp<int64_t>(height / 14, 1, 8);
    runs = (height + run - 1) / run;
    for (int64_t r = 0; r <= runs; ++r) {
      first_row.push_back(std::lower_bound(p.rows.first.begin(), p.rows.first.end(), r * run) -
                          p.rows.first.begin());
    }
    if (p.target.defined()) {
      class_weight.assign(classes, T(1));
      if (p.weight.defined()) std::copy_n(data<T>(p.weight), classes, class_weight.begin());
      for (const T weight : class_weight) weight_total += weight;
      smooth_share = static_cast<T>(p.label_smoothing / static_cast<double>(classes));
      hot_share = static_cast<T>(1 - p.label_smoothing);
    }
    const int64_t tasks = batch * runs;
    loss_sums.assign(tasks, 0), weight_sums.assign(tasks, 0);
    if (p.gradient.defined()) {
      carries = at::empty({tasks, classes, width}, p.gradient.options());
    }
    if (p.class_sums.defined()) {
      class_sums = at::zeros({tasks, 3, classes}, p.class_sums.options());
    }
  }

  void load(int64_t image, int64_t y, T* to) const {
    switch (p.logits.scalar_type()) {
      case at::kDouble:
        return load_row<T, double>(p.logits, image, y, stride, to);
      case at::kBFloat16:
        return load_row<T, at::BFloat16>(p.logits, image, y, stride, to);
      case at::kHalf:
        return load_row<T, at::Half>(p.logits, image, y, stride, to);
      default:
        return load_row<T, float>(p.logits, image, y, stride, to);
    }
  }
};

// The buffers of one thread, and what it does with a task.
template <typename T>
struct Worker {
  Job<T>& job;
  PredictionPass& p;
  Tensor memory;
  T *sources[2], *line, *first_grad, *second_grad, *top_grad, *bottom_grad, *values;
  T *sum, *log_sum, *gap, *smooth, *hot_weight, *of_softmax, *of_hot, *of_weight;  // a slot
  std::vector<int32_t> hot, best;
  int64_t loaded[2];
  PixelRow<T> row{};
  std::vector<int64_t> counts;  // [K, K]
  WrongValues wrong;

  explicit Worker(Job<T>& job_) : job(job_), p(job.p), hot(job.slots.size(), -1), best(hot) {
    const int64_t plane = job.classes * job.stride, slots = job.slots.size();
    const bool gradient = p.gradient.defined();
    memory = at::zeros({plane * (gradient ? 7 : 3) + job.classes * kLanes + 8 * slots},
                       p.logits.options().dtype(c10::CppTypeToScalarType<T>::value));
    T* next = data<T>(memory);
    const auto take = [&next](int64_t n) { return std::exchange(next, next + n); };
    for (T** buffer : {&sources[0], &sources[1], &line}) *buffer = take(plane);
    if (gradient) {
      for (T** buffer : {&first_grad, &second_grad, &top_grad, &bottom_grad}) *buffer = take(plane);
    }
    values = take(job.classes * kLanes);
    for (T** buffer : {&sum, &log_sum, &gap, &smooth, &hot_weight, &of_softmax, &of_hot, &of_weight}) {
      *buffer = take(slots);
    }
    if (p.confusion.defined()) counts.assign(job.classes * job.classes, 0);

    const bool smoothed = job.smooth_share > T(0);
    row.classes = job.classes, row.stride = job.stride, row.tiles = job.slots.tiles();
    row.step = p.columns.step, row.copy = p.columns.step == 0 && p.rows.step == 0;
    row.base = job.slots.base.data(), row.source = job.slots.source.data();
    row.column = job.slots.column.data();
    row.first_weight = job.slots.first_weight.data();
    row.second_weight = job.slots.second_weight.data();
    row.values = values;
    row.best = best.data();
    row.wants_exponentials = p.target.defined() || p.probability.defined() || gradient;
    if (row.wants_exponentials) row.sum = sum, row.log_sum = log_sum;
    if (p.target.defined()) {
      row.hot = hot.data(), row.gap = gap, row.class_weight = job.class_weight.data();
      if (smoothed) row.smooth = smooth, row.of_weight = of_weight;
    }
    if (gradient) {
      row.first_grad = first_grad, row.second_grad = second_grad;
      if (p.target.defined()) {
        row.of_softmax = of_softmax, row.of_hot = of_hot;
      } else {
        row.of_top = of_softmax;
      }
    }
  }

  // The buffer that holds source row y; never the one that holds `kept`.
  const T* source(int64_t image, int64_t y, int64_t kept) {
    for (int i : {0, 1}) {
      if (loaded[i] == y) return sources[i];
    }
    const int i = loaded[0] == kept ? 1 : 0;
    job.load(image, y, sources[i]);
    loaded[i] = y;
    return sources[i];
  }

  void task(int64_t index) {
    const int64_t image = index / job.runs, r = index % job.runs;
    const int64_t begin = r * job.run, end = std::min(begin + job.run, job.height);
    loaded[0] = loaded[1] = -1;
    if (p.class_sums.defined() && job.smooth_share > T(0)) {
      row.class_loss = data<T>(job.class_sums) + (index * 3 + 1) * job.classes;
    }
    int64_t current = begin;  // whose gradient top_grad holds
    for (int64_t y = job.first_row[r]; y < job.first_row[r + 1]; ++y) {
      const int64_t first = p.rows.first[y];
      const int64_t second = std::min(first + p.rows.step, job.height - 1);
      const T weight = static_cast<T>(p.rows.weight[y]);
      const T* top = source(image, first, second);
      const T* bottom = source(image, second, first);
      row.line = top;
      if (!row.copy) {
        job.kernels.combine(top, bottom, static_cast<T>(1 - p.rows.weight[y]), weight,
                            job.classes * job.stride, line);
        row.line = line;
      }
      before_row(image, y);
      job.kernels.pixels(row);
      after_row(index, image, y);
      if (!p.gradient.defined()) continue;
      current = advance(image, current, first);
      job.kernels.spread(first_grad, second_grad, job.classes, job.stride, job.width, row.step,
                         first == second ? T(1) : static_cast<T>(1 - p.rows.weight[y]), weight,
                         top_grad, first == second ? nullptr : bottom_grad);
    }
    if (!p.gradient.defined()) return;
    advance(image, current, end);
    T* carry = data<T>(job.carries) + index * job.classes * job.width;
    for (int64_t k = 0; k < job.classes; ++k) {
      std::copy_n(top_grad + k * job.stride, job.width, carry + k * job.width);
    }
    std::fill_n(top_grad, job.classes * job.stride, T(0));
  }

  // Writes the gradients of source rows [current, to), of which no more will come.
  int64_t advance(int64_t image, int64_t current, int64_t to) {
    for (; current < to; ++current) {
      T* out = data<T>(p.gradient) +
               (image * job.classes * job.height + current) * job.width;
      for (int64_t k = 0; k < job.classes; ++k) {
        std::copy_n(top_grad + k * job.stride, job.width, out + k * job.height * job.width);
      }
      std::fill_n(top_grad, job.classes * job.stride, T(0));
      std::swap(top_grad, bottom_grad);
    }
    return current;
  }

  // Labels of the row's slots, and the factors of their gradients.
  void before_row(int64_t image, int64_t y) {
    const int64_t slots = job.slots.size();
    const int32_t* column = job.slots.column.data();
    const T* upstream = p.upstream.defined()
                            ? data<T>(p.upstream) + (image * job.out_height + y) * job.out_width
                            : nullptr;
    if (!p.target.defined()) {
      for (int64_t s = 0; s < slots && row.of_top != nullptr; ++s) {
        of_softmax[s] = column[s] < 0 ? T(0) : upstream ? upstream[column[s]] : T(1);
      }
      return;
    }
    with_label_type("target", p.target, [&](auto tag) {
      using L = decltype(tag);
      const L* labels =
          p.target.const_data_ptr<L>() + image * p.target.stride(0) + y * p.target.stride(1);
      const int64_t by_column = p.target.stride(2);
      bool all_known = true;
      for (int64_t s = 0; s < slots; ++s) {
        const auto value = static_cast<int64_t>(labels[std::max(column[s], 0) * by_column]);
        const bool known = static_cast<uint64_t>(value) < static_cast<uint64_t>(job.classes);
        const bool counts = value != p.ignore_index && column[s] >= 0;
        hot[s] = known && counts ? static_cast<int32_t>(value) : -1;
        hot_weight[s] = job.class_weight[known ? value : 0];
        all_known = all_known && (known || !counts);
      }
      for (int64_t s = 0; s < slots && !all_known; ++s) {
        const auto value = static_cast<int64_t>(labels[std::max(column[s], 0) * by_column]);
        if (column[s] < 0 || value == p.ignore_index) continue;
        if (value < 0 || value >= job.classes) wrong.see(value);
      }
    });
    if (!p.gradient.defined() && !p.class_sums.defined()) return;
    // Of one class the softmax is 1 whatever the logits: its gradient is 0, not the round-off of a sum.
    const bool constant = job.classes == 1;
    for (int64_t s = 0; s < slots; ++s) {
      const T scale = hot[s] < 0 || constant ? T(0) : upstream ? upstream[column[s]] : T(1);
      of_hot[s] = hot[s] < 0 ? T(0) : scale * job.hot_share * hot_weight[s];
      of_weight[s] = scale * job.smooth_share;
      of_softmax[s] = of_hot[s] + of_weight[s] * job.weight_total;
    }
  }

  // From slots to pixels.
  void after_row(int64_t index, int64_t image, int64_t y) {
    const int64_t slots = job.slots.size(), at = (image * job.out_height + y) * job.out_width;
    const int32_t* column = job.slots.column.data();
    if (p.label.defined()) {
      int64_t* label = data<int64_t>(p.label) + at;
      for (int64_t s = 0; s < slots; ++s) {
        if (column[s] >= 0) label[column[s]] = best[s];
      }
    }
    if (p.probability.defined()) {
      T* probability = data<T>(p.probability) + at;
      for (int64_t s = 0; s < slots; ++s) {
        if (column[s] >= 0) probability[column[s]] = T(1) / sum[s];
      }
    }
    if (!p.target.defined()) return;
    if (p.class_sums.defined()) {
      T* sums = data<T>(job.class_sums) + index * 3 * job.classes;
      const T* upstream = data<T>(p.upstream);
      for (int64_t s = 0; s < slots; ++s) {
        if (hot[s] < 0) continue;
        const T scale = upstream ? upstream[at + column[s]] : T(1);
        sums[hot[s]] += scale * job.hot_share * (log_sum[s] + gap[s]);
        sums[2 * job.classes + hot[s]] += T(1);
      }
    }
    double loss_sum = 0, weight_sum = 0;
    T* loss = gap;  // in its place
    for (int64_t s = 0; s < slots; ++s) {
      T value = job.hot_share * hot_weight[s] * (log_sum[s] + gap[s]);
      if (row.smooth) value += job.smooth_share * (job.weight_total * log_sum[s] + smooth[s]);
      loss[s] = hot[s] < 0 ? T(0) : value;
      loss_sum += static_cast<double>(loss[s]);
      weight_sum += hot[s] < 0 ? 0.0 : static_cast<double>(hot_weight[s]);
    }
    for (int64_t s = 0; s < slots && !counts.empty(); ++s) {
      if (hot[s] >= 0) ++counts[hot[s] * job.classes + best[s]];
    }
    if (p.losses.defined()) {
      T* losses = data<T>(p.losses) + at;
      for (int64_t s = 0; s < slots; ++s) {
        if (column[s] >= 0) losses[column[s]] = loss[s];
      }
    }
    job.loss_sums[index] += loss_sum;
    job.weight_sums[index] += weight_sum;
  }

  // Integers and extremes: the order does not matter.
  void merge() {
    const std::lock_guard<std::mutex> guard(job.merging);
    p.wrong.see(wrong);
    if (counts.empty()) return;
    int64_t* confusion = data<int64_t>(p.confusion);
    for (size_t i = 0; i < counts.size(); ++i) confusion[i] += counts[i];
  }
};

}  // namespace

PredictionPass::PredictionPass(const Tensor& logits_, at::IntArrayRef size, bool align_corners)
    : logits(logits_),
      rows(logits_.size(2), size[0], align_corners),
      columns(logits_.size(3), size[1], align_corners) {}

template <typename T>
void PredictionPass::run_as() {
  Job<T> job(*this);
  at::parallel_for(0, job.batch * job.runs, 1, [&](int64_t begin, int64_t end) {
    Worker<T> worker(job);
    for (int64_t index = begin; index < end; ++index) worker.task(index);
    worker.merge();
  });
  for (const double sum : job.loss_sums) loss_sum += sum;
  for (const double sum : job.weight_sums) weight_sum += sum;
  for (int64_t task = 0; class_sums.defined() && task < job.batch * job.runs; ++task) {
    class_sums.add_(job.class_sums[task]);
  }
  if (!gradient.defined()) return;
  const int64_t plane = job.classes * job.width;
  for (int64_t image = 0; image < job.batch; ++image) {
    for (int64_t r = 1; r < job.runs; ++r) {
      const T* carry = data<T>(job.carries) + (image * job.runs + r - 1) * plane;
      T* out = data<T>(gradient) + image * plane * job.height + r * job.run * job.width;
      for (int64_t k = 0; k < job.classes; ++k) {
        for (int64_t x = 0; x < job.width; ++x) {
          out[k * job.height * job.width + x] += carry[k * job.width + x];
        }
      }
    }
  }
}

void PredictionPass::run() {
  if (accumulation_type(logits.scalar_type()) == at::kDouble) {
    run_as<double>();
  } else {
    run_as<float>();
  }
}

}  // namespace spectralx::cpu
