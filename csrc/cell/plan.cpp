#include "cell/plan.h"

#include <list>
#include <stdexcept>

#include "cell/kernels.h"

namespace rmc {
namespace {

constexpr int64_t kGroupRows = 64;   // rows that a backward tile walks back in time together
constexpr int64_t kChunkRows = 256;  // rows that recomputation and weight gradients take at once
constexpr int64_t kMaxSize = int64_t{1} << 30;

struct Storage {
  std::list<std::vector<int32_t>> indices;
  std::list<std::vector<char>> masks;
  std::vector<Block> blocks;
  std::vector<Linear> layers;
};

class Builder {
 public:
  Builder(const CellConfig& config, Isa isa, Precision precision) : config_(config) {
    const Shape shape = kernels(isa, precision).shape;
    plan_.config = config;
    plan_.isa = isa;
    plan_.precision = precision;
    plan_.W = shape.width;
    terms_ = shape.terms;
    plan_.max_rows = shape.max_rows;
  }

  std::shared_ptr<const Plan> build() {
    sizes();
    axes();
    parameters();
    offsets();
    plan_.block = storage_->blocks.data();
    plan_.mlp = storage_->layers.data();
    plan_.storage = storage_;
    return std::make_shared<const Plan>(plan_);
  }

 private:
  int64_t up(int64_t size) const { return (size + plan_.W - 1) / plan_.W * plan_.W; }

  void sizes() {
    Plan& p = plan_;
    p.N = config_.slots, p.n = config_.rows, p.S = p.N + p.n, p.H = config_.heads;
    p.K = config_.key_size, p.V = config_.head_size, p.I = config_.input_size, p.L = config_.mlp_layers;
    p.blocks = config_.blocks;
    for (int64_t size : {p.N, p.n, p.H, p.K, p.V, p.I, p.L, p.blocks}) {
      if (size < 1 || size > kMaxSize) throw std::invalid_argument("spec: a size is out of range");
    }
    p.D = p.H * p.V, p.F = p.H * (2 * p.K + p.V);
    p.Kp = up(p.K), p.Vp = up(p.V), p.head_stride = 2 * p.Kp + p.Vp;
    p.Dp = up(p.D), p.Fp = p.H * p.head_stride, p.Ip = up(p.I);
    if (p.Fp > kMaxSize || p.n * p.Dp > kMaxSize) throw std::invalid_argument("spec: the cell is too large");
    p.G = config_.gate == Gate::kUnit ? p.D : config_.gate == Gate::kMemory ? 1 : 0;
    p.Gp = up(p.G);
    p.live_inputs = p.blocks > 1 || config_.joint_norm;
    p.Q = p.live_inputs ? p.S : p.N;
    p.lanes = up(p.H * p.Q);
    // Softmax runs over keys: at a stride of many cache lines all keys of a lane would share a few sets of the L1
    // cache.
    const int64_t line = p.precision == Precision::kFloat64 ? 8 : 16;
    p.lane_stride = p.lanes % (8 * line) ? p.lanes : p.lanes + line;
    p.group = kGroupRows > p.Q ? kGroupRows / p.Q : 1;
    p.chunk = (kChunkRows + p.group * p.Q - 1) / (p.group * p.Q);
  }

  // Consecutive runs of `size` true positions, each padded to a multiple of W.
  Axis axis(std::initializer_list<int64_t> runs, int64_t repeat) {
    Axis a;
    std::vector<int32_t> index;
    for (int64_t r = 0; r < repeat; r++) {
      for (int64_t size : runs) {
        for (int64_t i = 0; i < up(size); i++) {
          index.push_back(i < size ? static_cast<int32_t>(a.size + i) : -1);
        }
        a.size += size;
      }
    }
    a.padded = static_cast<int64_t>(index.size());
    if (a.padded > a.size) {
      std::vector<char> mask;
      for (int32_t i : index) mask.insert(mask.end(), plan_.precision == Precision::kFloat64 ? 8 : 4, i < 0 ? 0 : -1);
      storage_->masks.push_back(std::move(mask));
      a.mask = storage_->masks.back().data();
    }
    storage_->indices.push_back(std::move(index));
    a.index = storage_->indices.back().data();
    return a;
  }

  void axes() {
    width_ = axis({plan_.D}, 1);
    qkv_ = axis({plan_.K, plan_.K, plan_.V}, plan_.H);
    features_ = axis({plan_.I}, 1);
    rows_ = axis({plan_.D}, plan_.n);
    if (plan_.G) gates_ = axis({plan_.G, plan_.G}, 1);
  }

  Linear linear(const Axis& out, const Axis& in) {
    Linear l;
    l.weight = next_++;
    l.bias_param = next_++;
    l.out = out;
    l.in = in;
    return l;
  }

  Norm norm(const Axis& features) {
    Norm n;
    n.weight = next_++;
    n.bias_param = next_++;
    n.rows = config_.joint_norm ? plan_.S : 1;
    n.features = features;
    return n;
  }

  // In the order of CellSpec.parameter_shapes.
  void parameters() {
    if (config_.input_projection) plan_.input = linear(width_, features_);
    plan_.unique_blocks = config_.tied ? 1 : plan_.blocks;
    for (int64_t b = 0; b < plan_.unique_blocks; b++) {
      Block block;
      block.qkv = linear(qkv_, width_);
      block.qkv.reused = true;  // by memory rows and input rows
      block.qkv.centred = config_.qkv_norm && !config_.joint_norm;
      if (config_.qkv_norm) block.qkv_norm = norm(qkv_);
      if (config_.output_projection) block.output = linear(width_, width_);
      block.output.reused = config_.tied;
      if (config_.attention_norm) block.attention_norm = norm(width_);
      if (config_.mlp_norm) block.mlp_norm = norm(width_);
      storage_->blocks.push_back(block);
    }
    plan_.unique_layers = config_.tied ? 1 : plan_.L;
    for (int64_t l = 0; l < plan_.unique_layers; l++) {
      Linear layer = linear(width_, width_);
      layer.reused = config_.tied || plan_.blocks > 1;  // blocks share their MLP
      storage_->layers.push_back(layer);
    }
    if (plan_.G) {
      plan_.input_gate = linear(gates_, rows_);
      plan_.memory_gate = linear(gates_, width_);
    }
    if (config_.trains_gate_biases) {
      plan_.forget_bias_param = next_++;
      plan_.input_bias_param = next_++;
    }
    plan_.params = next_;
  }

  template <class Function>
  void each_linear(Function f) {
    if (plan_.input.weight >= 0) f(plan_.input);
    if (plan_.input_gate.weight >= 0) f(plan_.input_gate);
    if (plan_.memory_gate.weight >= 0) f(plan_.memory_gate);
    for (Block& b : storage_->blocks) {
      f(b.qkv);
      if (b.output.weight >= 0) f(b.output);
    }
    for (Linear& l : storage_->layers) f(l);
  }

  template <class Function>
  void each_norm(Function f) {
    for (Block& b : storage_->blocks) {
      if (b.qkv_norm.weight >= 0) f(b.qkv_norm);
      if (b.attention_norm.weight >= 0) f(b.attention_norm);
      if (b.mlp_norm.weight >= 0) f(b.mlp_norm);
    }
  }

  void offsets() {
    int64_t packed = 0, grad = 0;
    auto take = [](int64_t& at, int64_t size) {
      const int64_t start = at;
      at += (size + 15) / 16 * 16;  // whole cache lines, whatever the instruction set
      return start;
    };
    each_norm([&](Norm& n) {
      n.grad_gamma = take(grad, n.rows * n.features.padded);
      n.grad_beta = take(grad, n.rows * n.features.padded);
    });
    plan_.norm_gradient_size = grad;
    each_linear([&](Linear& l) {
      l.packed = take(packed, packed_size(terms_, l.in.padded, l.out.padded));
      plan_.widest_input = std::max(plan_.widest_input, l.in.padded);
      l.bias = take(packed, l.out.padded);
      l.grad = take(grad, l.out.padded * l.in.padded);
      l.grad_bias = take(grad, l.out.padded);
    });
    each_norm([&](Norm& n) {
      n.gamma = take(packed, n.rows * n.features.padded);
      n.beta = take(packed, n.rows * n.features.padded);
    });
    plan_.means = take(packed, plan_.Dp);
    plan_.forward_weights = packed;
    each_linear([&](Linear& l) { l.packed_back = take(packed, packed_size(terms_, l.out.padded, l.in.padded)); });
    plan_.all_weights = packed;
    plan_.gradient_size = grad;
  }

  CellConfig config_;
  int terms_ = 0;
  Plan plan_;
  std::shared_ptr<Storage> storage_ = std::make_shared<Storage>();
  Axis width_, qkv_, features_, rows_, gates_;
  int next_ = 0;
};

}  // namespace

std::shared_ptr<const Plan> make_plan(const CellConfig& config, Isa isa, Precision precision) {
  return Builder(config, isa, precision).build();
}

int panel_height(int64_t rows, int64_t max_rows) {
  if (rows <= max_rows) return rows < 1 ? 1 : static_cast<int>(rows);
  int64_t best = max_rows, least = -1;
  for (int64_t height = max_rows; height >= (max_rows + 1) / 2; height--) {
    const int64_t cost = (rows + height - 1) / height * (height + 1);  // + 1: loads and stores of the panel
    if (least < 0 || cost < least) best = height, least = cost;
  }
  return static_cast<int>(best);
}

}  // namespace rmc
