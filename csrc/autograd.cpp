// The autograd kernel of every operator: one boxed function, for all schemas. _autograd.py is the same in
// Python, for where there is no extension.
#include "cpu/torch.h"

#include "autograd.h"

#include <algorithm>
#include <deque>
#include <memory>
#include <numeric>

#include <torch/csrc/autograd/custom_function.h>

namespace spectralx {

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;

struct Differentiable {
  c10::OperatorHandle forward, backward;
  size_t arguments, outputs;
  std::vector<int64_t> scored;  // outputs that have a gradient
  Kept kept;
};

// All that were registered. What autograd keeps of a call names its own by its place.
std::deque<Differentiable>& differentiable() {
  static auto* all = new std::deque<Differentiable>;  // kernels may run while the process ends
  return *all;
}

struct Call {
  size_t place;
  c10::DispatchKeySet keys;
  at::ArrayRef<c10::IValue> arguments;
  Stack& outputs;  // filled by `Node::forward`
};

// As _layouts.stand_in: a tensor of the shape and dtype of `value` that holds next to nothing.
Tensor stand_in(const Tensor& value) {
  if (value.sym_numel() == 0) return value;
  const auto sizes = value.sym_sizes(), strides = value.sym_strides();
  std::vector<int64_t> order(value.dim());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return strides[a] == strides[b] ? a > b : strides[a] < strides[b];
  });
  std::vector<c10::SymInt> steps(value.dim());
  c10::SymInt last = 0;
  for (int64_t i = 0; i < value.dim(); ++i) {
    steps[order[i]] = i + 1;
    last += (sizes[order[i]] - 1) * (i + 1);
  }
  return value.new_zeros_symint({last + 1}).as_strided_symint(sizes, steps);
}

struct Node : torch::autograd::Function<Node> {
  static constexpr bool is_traceable = true;  // backward calls an operator and no more

  // The outputs that have a gradient; autograd is not told of the others, as compiled autograd takes no
  // function that marks some. `tensors` are those among the arguments: autograd sees them there.
  static variable_list forward(AutogradContext* context, const Call& call, at::TensorList tensors) {
    const Differentiable& op = differentiable()[call.place];
    const Kept& kept = op.kept;
    Stack& outputs = call.outputs;
    outputs.assign(call.arguments.begin(), call.arguments.end());
    {
      const at::AutoDispatchBelowAutograd below;
      op.forward.redispatchBoxed(call.keys & c10::after_autograd_keyset, &outputs);
    }
    context->set_materialize_grads(false);

    variable_list saved;
    if (!kept.only_if.has_value() || call.arguments[*kept.only_if].toBool()) {
      for (const int64_t i : kept.outputs) saved.push_back(outputs[i].toTensor());
    }
    const auto outputs_saved = static_cast<int64_t>(saved.size());
    const auto wanted = [&](int64_t i) {
      return call.arguments[i].isTensor() && call.arguments[i].toTensor().requires_grad();
    };
    c10::impl::GenericList others(c10::AnyType::get());
    std::vector<int64_t> positions;
    for (int64_t i = 0; i < static_cast<int64_t>(call.arguments.size()); ++i) {
      const bool is_tensor = call.arguments[i].isTensor();
      others.push_back(is_tensor ? c10::IValue() : call.arguments[i]);
      if (!is_tensor) continue;
      positions.push_back(i);
      const Tensor& tensor = call.arguments[i].toTensor();
      const auto rule = kept.read_for.find(i);
      const bool read = rule == kept.read_for.end() ||
                        std::any_of(rule->second.begin(), rule->second.end(), wanted);
      saved.push_back(read ? tensor : stand_in(tensor));
    }
    context->save_for_backward(std::move(saved));
    auto& data = context->saved_data;
    data["operator"] = static_cast<int64_t>(call.place);
    data["outputs"] = outputs_saved;
    data["positions"] = positions;
    data["others"] = std::move(others);
    variable_list scored;
    for (const int64_t i : op.scored) scored.push_back(outputs[i].toTensor());
    return scored;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    auto& data = context->saved_data;
    const Differentiable& op = differentiable()[data["operator"].toInt()];
    const auto outputs = static_cast<size_t>(data["outputs"].toInt());
    const std::vector<int64_t> positions = data["positions"].toIntVector();
    const variable_list saved = context->get_saved_variables();

    c10::List<std::optional<Tensor>> output_grads;
    output_grads.resize(op.outputs - op.kept.hidden);
    for (size_t i = 0; i < op.scored.size(); ++i) {
      if (grads[i].defined()) output_grads[op.scored[i]] = std::optional<Tensor>(grads[i]);
    }
    Stack stack{std::move(output_grads)};
    for (const c10::IValue& other : data["others"].toListRef()) stack.push_back(other);
    c10::List<bool> mask;
    for (size_t i = 0; i < op.arguments; ++i) mask.push_back(false);
    for (size_t i = 0; i < positions.size(); ++i) {
      stack[1 + positions[i]] = saved[outputs + i];
      mask[positions[i]] = context->needs_input_grad(i);
    }
    stack.emplace_back(c10::List<Tensor>(at::ArrayRef<Tensor>(saved.data(), outputs)));
    stack.emplace_back(mask);
    {
      // The caller may run backward inside its autocast block; the casts are in the graph.
      const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
      op.backward.callBoxed(&stack);
    }
    const std::vector<Tensor> computed = stack.front().toTensorVector();
    variable_list found(1 + positions.size());  // of `call` first, which has none
    size_t next = 0;
    for (size_t i = 0; i < positions.size(); ++i) {
      if (mask.get(positions[i])) found[1 + i] = computed[next++];
    }
    return found;
  }
};

struct Kernel final : c10::OperatorKernel {
  size_t place;

  explicit Kernel(size_t place_) : place(place_) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) const {
    const auto arguments = torch::jit::last(*stack, differentiable()[place].arguments);
    variable_list tensors;
    for (const auto& argument : arguments) {
      if (argument.isTensor()) tensors.push_back(argument.toTensor());
    }
    if (!at::GradMode::is_enabled() ||
        std::none_of(tensors.begin(), tensors.end(),
                     [](const Tensor& tensor) { return tensor.requires_grad(); })) {
      const at::AutoDispatchBelowAutograd below;
      op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
      return;
    }
    Stack outputs;
    const variable_list scored =
        Node::apply(Call{place, keys, arguments, outputs}, at::TensorList(tensors));
    const auto& places = differentiable()[place].scored;
    for (size_t i = 0; i < scored.size(); ++i) outputs[places[i]] = scored[i];
    torch::jit::drop(*stack, arguments.size());
    stack->insert(stack->end(), outputs.begin(), outputs.end());
  }
};

}  // namespace

void differentiate(const std::string& name, const std::string& overload, const Kept& kept) {
  auto& dispatcher = c10::Dispatcher::singleton();
  const std::string qualified = "spectralx::" + name;
  const auto forward = dispatcher.findSchemaOrThrow(qualified.c_str(), overload.c_str());
  const auto backward =
      dispatcher.findSchemaOrThrow((qualified + "_backward").c_str(), overload.c_str());
  const auto& schema = forward.schema();
  const size_t place = differentiable().size(), outputs = schema.returns().size();
  std::vector<int64_t> scored;
  for (int64_t i = 0; i < static_cast<int64_t>(outputs) - kept.hidden; ++i) {
    if (std::find(kept.constant.begin(), kept.constant.end(), i) == kept.constant.end())
      scored.push_back(i);
  }
  differentiable().push_back(
      {forward, backward, schema.arguments().size(), outputs, std::move(scored), kept});
  // Lives as long as the process, as what TORCH_LIBRARY_IMPL makes does.
  static auto* library = new torch::Library(torch::Library::IMPL, "spectralx",
                                            c10::DispatchKey::Autograd, __FILE__, __LINE__);
  library->impl((overload.empty() ? name : name + "." + overload).c_str(),
                torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Kernel>(place)));
}

}  // namespace spectralx
