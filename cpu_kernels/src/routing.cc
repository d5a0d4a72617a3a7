// Which experts a token takes: affinities, the best of them within the best groups, and their weights.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace mla {

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kTaskNumbers = 128;  // enough to pay for taking them
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The rule: K of E experts, out of those of some groups.
struct Rule {
  int64_t experts, chosen, groups, groups_used, best_of_group;
  bool is_softmax, normalizes;
  float scale;
};

// The places of the largest numbers, the largest first, and of equal ones the first. A NaN is larger than all others.
class Best {
 public:
  explicit Best(int64_t count) : count_(count) { found_.reserve(count + 1); }

  void clear() { found_.clear(); }
  void offer(float number, int64_t place) {
    if (number != number) number = kInfinity;
    if (size() == count_ && !(number > found_.back().number)) return;
    auto at = found_.end();
    while (at != found_.begin() && (at - 1)->number < number) --at;
    found_.insert(at, {number, place});
    if (size() > count_) found_.pop_back();
  }
  int64_t size() const { return static_cast<int64_t>(found_.size()); }
  int64_t place(int64_t i) const { return found_[i].place; }
  float number(int64_t i) const { return found_[i].number; }

 private:
  struct Found {
    float number;
    int64_t place;
  };
  int64_t count_;
  std::vector<Found> found_;
};

// Softmax or sigmoids of logits.
void affinities(const float* logits, const Rule& rule, float* out) {
  if (!rule.is_softmax) {
    for (int64_t e = 0; e < rule.experts; ++e) out[e] = 1 / (1 + std::exp(-logits[e]));
    return;
  }
  float largest = -kInfinity, sum = 0;
  for (int64_t e = 0; e < rule.experts; ++e) largest = std::max(largest, logits[e]);
  for (int64_t e = 0; e < rule.experts; ++e) sum += out[e] = std::exp(logits[e] - largest);
  for (int64_t e = 0; e < rule.experts; ++e) out[e] /= sum;
}

class Router {
 public:
  explicit Router(const Rule& rule)
      : rule_(rule), best_(rule.chosen), in_group_(rule.best_of_group), groups_(rule.groups_used),
        probs_(rule.experts), scores_(rule.experts) {}

  // Keeps the first `minimum`, and of the others those with at least `threshold` of the best score.
  void route(const float* logits, const float* bias, int32_t minimum, float threshold, int32_t* ids, float* weights) {
    affinities(logits, rule_, probs_.data());
    for (int64_t e = 0; e < rule_.experts; ++e) scores_[e] = bias == nullptr ? probs_[e] : probs_[e] + bias[e];
    choose();
    const float bar = std::isinf(threshold) ? kInfinity : threshold * scores_[best_.place(0)];
    float sum = 0;
    for (int64_t k = 0; k < rule_.chosen; ++k) {
      const int64_t e = best_.place(k);
      const bool is_kept = k < minimum || threshold <= 0 || scores_[e] >= bar;
      ids[k] = static_cast<int32_t>(is_kept ? e : rule_.experts);
      weights[k] = is_kept ? probs_[e] : 0;
      sum += weights[k];
    }
    constexpr float kTiny = 1e-20f;  // sigmoids may all be 0 in float32
    for (int64_t k = 0; k < rule_.chosen; ++k)
      weights[k] = (rule_.normalizes ? weights[k] / (sum + kTiny) : weights[k]) * rule_.scale;
  }

 private:
  void choose() {
    best_.clear();
    if (rule_.groups == 1) return offer_group(0, &best_);
    groups_.clear();
    for (int64_t g = 0; g < rule_.groups; ++g) {
      in_group_.clear();
      offer_group(g, &in_group_);
      float score = 0;
      for (int64_t i = 0; i < in_group_.size(); ++i) score += in_group_.number(i);
      groups_.offer(score, g);
    }
    kept_.clear();
    for (int64_t i = 0; i < groups_.size(); ++i) kept_.push_back(groups_.place(i));
    std::sort(kept_.begin(), kept_.end());  // of equal experts the first is taken
    for (const int64_t g : kept_) offer_group(g, &best_);
  }

  void offer_group(int64_t group, Best* best) const {
    const int64_t size = rule_.experts / rule_.groups;
    for (int64_t e = group * size; e < (group + 1) * size; ++e) best->offer(scores_[e], e);
  }

  const Rule& rule_;
  Best best_, in_group_, groups_;
  std::vector<float> probs_, scores_;
  std::vector<int64_t> kept_;
};

// logits [X, E], bias [E] or nothing, minimum and threshold [X] or nothing -> ids and weights [X, K].
ffi::Error select_experts(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> logits, ffi::Buffer<ffi::F32> bias,
                          ffi::Buffer<ffi::S32> minimum, ffi::Buffer<ffi::F32> threshold,
                          ffi::ResultBuffer<ffi::S32> ids, ffi::ResultBuffer<ffi::F32> weights, bool is_softmax,
                          int64_t groups, int64_t groups_used, int64_t best_of_group, bool normalizes, float scale) {
  const auto shape = logits.dimensions(), chosen = ids->dimensions();
  if (shape.size() != 2 || chosen.size() != 2 || weights->element_count() != ids->element_count())
    return ffi::Error::InvalidArgument("logits, ids and weights must have two axes");
  const Rule rule{shape[1], chosen[1], groups, groups_used, best_of_group, is_softmax, normalizes, scale};
  const int64_t tokens = shape[0];
  const bool has_bias = bias.element_count() > 0, is_reduced = minimum.element_count() > 0;
  if (groups < 1 || rule.experts % groups != 0 || groups_used < 1 || groups_used > groups || best_of_group < 1 ||
      best_of_group > rule.experts / groups || rule.chosen < 1 || rule.chosen > rule.experts / groups * groups_used)
    return ffi::Error::InvalidArgument("groups and numbers of experts do not fit each other");
  if (chosen[0] != tokens || (has_bias && static_cast<int64_t>(bias.element_count()) != rule.experts) ||
      minimum.element_count() != threshold.element_count() ||
      (is_reduced && static_cast<int64_t>(minimum.element_count()) != tokens))
    return ffi::Error::InvalidArgument("bias, minimum and threshold do not fit the logits");
  parallel_ranges(pool, tokens, step_of(kTaskNumbers, rule.experts), [&](int64_t begin, int64_t end) {
    Router router(rule);
    for (int64_t i = begin; i < end; ++i)
      router.route(logits.typed_data() + i * rule.experts, has_bias ? bias.typed_data() : nullptr,
                   is_reduced ? minimum.typed_data()[i] : 0, is_reduced ? threshold.typed_data()[i] : 0,
                   ids->typed_data() + i * rule.chosen, weights->typed_data() + i * rule.chosen);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(mla_select_experts, select_experts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("is_softmax")
                                  .Attr<int64_t>("groups")
                                  .Attr<int64_t>("groups_used")
                                  .Attr<int64_t>("best_of_group")
                                  .Attr<bool>("normalizes")
                                  .Attr<float>("scale"));

}  // namespace mla
