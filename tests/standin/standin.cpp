// Two devices over host memory, under PyTorch's key PrivateUse1: what a GPU is to its callers, without one.
// Every operation runs on the CPU's kernel for it, refuses tensors of two devices, and is counted.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>

namespace {

using at::IValue;
using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;

constexpr DeviceType kType = DeviceType::PrivateUse1;
constexpr DeviceIndex kDevices = 2;
constexpr int64_t kRound = 512;  // bytes that CUDA's allocator rounds a block to

thread_local DeviceIndex current = 0;

// What was counted since the last reset. Work on a GPU is launched, and goes on while Python does; a wait is
// whatever has Python learn a number from the device, an upload whatever brings it one.
struct Counts {
  std::mutex lock;
  std::map<std::string, int64_t> launches, waits, uploads;
  bool refuse_waits = false;

  void wait(const std::string& name) {
    TORCH_CHECK(!refuse_waits, name, " waits for the device");
    std::lock_guard<std::mutex> hold(lock);
    ++waits[name];
  }
  void add(std::map<std::string, int64_t>& to, const std::string& name) {
    std::lock_guard<std::mutex> hold(lock);
    ++to[name];
  }
} counts;

// Operations whose result's shape, or whose Python caller, needs a number from the device.
const std::set<std::string> kWaits = {
    "aten::nonzero",       "aten::masked_select",    "aten::_unique2", "aten::unique_dim",
    "aten::_unique",       "aten::equal",            "aten::bincount", "aten::unique_consecutive",
    "aten::unique_dim_consecutive", "aten::linalg_eigh", "aten::_linalg_eigh", "aten::_linalg_svd",
};

struct Memory {
  int64_t held = 0, peak = 0, limit = 0, refused = 0;
};

struct Block {
  void* data;
  int64_t bytes;
  DeviceIndex device;
};

struct HostMemory final : c10::DeviceAllocator {
  std::mutex lock;
  Memory of[kDevices];

  c10::DataPtr allocate(size_t asked) override {
    const auto device = current;
    const int64_t bytes = (static_cast<int64_t>(asked) + kRound - 1) / kRound * kRound;
    {
      std::lock_guard<std::mutex> hold(lock);
      auto& memory = of[device];
      memory.refused += memory.limit && memory.held + bytes > memory.limit;
      TORCH_CHECK_WITH(
          OutOfMemoryError, !memory.limit || memory.held + bytes <= memory.limit,
          "standin out of memory. Tried to allocate ", bytes, " bytes of ", memory.limit - memory.held);
      memory.held += bytes;
      memory.peak = std::max(memory.peak, memory.held);
    }
    void* data = bytes ? std::aligned_alloc(64, bytes) : nullptr;
    return {data, new Block{data, bytes, device}, &release, Device(kType, device)};
  }
  static void release(void* given);
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override {
    c10::CachingDeviceAllocator::DeviceStats out;
    for (auto* stat : {&out.allocated_bytes[0], &out.reserved_bytes[0]}) {
      stat->current = of[device].held;
      stat->peak = of[device].peak;
    }
    out.num_ooms = of[device].refused;
    return out;
  }
  void resetAccumulatedStats(DeviceIndex device) override { of[device].refused = 0; }
  void resetPeakStats(DeviceIndex device) override { of[device].peak = of[device].held; }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex device) override {
    const auto& memory = of[device];
    const int64_t all = memory.limit ? memory.limit : int64_t{1} << 36;
    return {all - memory.held, all};
  }
} memory;

void HostMemory::release(void* given) {
  auto* block = static_cast<Block*>(given);
  {
    std::lock_guard<std::mutex> hold(memory.lock);
    memory.of[block->device].held -= block->bytes;
  }
  std::free(block->data);
  delete block;
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return kType; }
  Device exchangeDevice(Device device) const override {
    const Device before(kType, current);
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return Device(kType, current); }
  void setDevice(Device device) const override { current = device.has_index() ? device.index() : current; }
  void uncheckedSetDevice(Device device) const noexcept override { setDevice(device); }
  c10::Stream getStream(Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  void synchronizeDevice(DeviceIndex) const override { counts.wait("synchronize"); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

bool available = false;

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return available; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return kDevices; }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex exchangeDevice(DeviceIndex device) const override { return std::exchange(current, device); }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
  void setCurrentDevice(DeviceIndex device) const override { current = device; }
} hooks;

Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device> device,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard guard(device);
  const auto kind = dtype.value_or(at::get_default_dtype_as_scalartype());
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), kind, format);
}

Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<Device> device, std::optional<bool>) {
  const c10::OptionalDeviceGuard guard(device);
  const auto kind = dtype.value_or(at::get_default_dtype_as_scalartype());
  return at::detail::empty_strided_generic(
      size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), kind);
}

// The same memory as a tensor of the CPU.
Tensor on_host(const Tensor& given) {
  const auto options = given.options().device(at::kCPU);
  if (given.numel() == 0) return at::empty_strided(given.sizes(), given.strides(), options);
  const auto count = static_cast<int64_t>(given.storage().nbytes() / given.itemsize());
  const auto whole = at::from_blob(given.storage().mutable_data(), {count}, options);
  return whole.as_strided(given.sizes(), given.strides(), given.storage_offset());
}

// One operation's tensors: the device's own, and as the CPU's kernel gets them.
struct Call {
  std::string name;
  std::optional<Device> device;
  std::vector<std::pair<Tensor, Tensor>> both;
  bool launched = false;

  Tensor given(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (tensor.device().type() != kType) {
      // Numbers may come from the CPU, and indices, as on a GPU; the latter are brought there.
      const bool index = name == "aten::index" || name.rfind("aten::index_put", 0) == 0;
      if (index && tensor.scalar_type() == at::kLong) {
        counts.add(counts.uploads, "indices from the CPU");
        return tensor;
      }
      TORCH_CHECK(tensor.dim() == 0, name, ": expected all tensors to be on the same device, but one is on the CPU");
      return tensor;
    }
    TORCH_CHECK(!device || *device == tensor.device(), name, ": expected all tensors to be on the same device, but found ",
        *device, " and ", tensor.device());
    device = tensor.device();
    both.emplace_back(tensor, on_host(tensor));
    return both.back().second;
  }

  IValue given(const IValue& value) {
    if (value.isTensor()) return given(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> out;
      for (const Tensor& one : value.toTensorVector()) out.push_back(given(one));
      return out;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> out;
      for (const std::optional<Tensor> one : value.toOptionalTensorList())
        out.push_back(one && one->defined() ? std::optional<Tensor>(given(*one)) : std::nullopt);
      return out;
    }
    if (value.isDevice() && value.toDevice().type() == kType) {
      device = value.toDevice();
      return Device(at::kCPU);
    }
    return value;
  }

  Tensor taken(const Tensor& result) {
    if (!result.defined() || result.device().type() == kType) return result;
    const auto* data = static_cast<const char*>(result.data_ptr());
    for (const auto& [own, host] : both)
      if (host.is_same(result) && host.sizes() == own.sizes()) {
        launched = true;
        return own;
      }
    for (const auto& [own, host] : both) {
      const auto* start = static_cast<const char*>(own.storage().data());
      if (result.numel() && start && data >= start && data < start + own.storage().nbytes()) {
        auto view = at::detail::make_tensor<c10::TensorImpl>(
            c10::TensorImpl::VIEW, c10::Storage(own.storage()), own.key_set(), result.dtype());
        view.unsafeGetTensorImpl()->set_sizes_and_strides(
            result.sizes(), result.strides(), (data - start) / static_cast<int64_t>(result.itemsize()));
        return view;
      }
    }
    launched = true;  // what is neither a view nor written in place is new
    const auto options = result.options().device(device.value_or(Device(kType, current)));
    auto out = at::empty_strided(result.sizes(), result.strides(), options);
    if (result.numel()) at::from_blob(out.data_ptr(), out.sizes(), out.strides(), result.options()).copy_(result);
    for (const auto& [own, host] : both)
      if (host.is_same(result)) {  // an output that was empty, and has its size now
        own.unsafeGetTensorImpl()->set_storage_keep_dtype(out.storage());
        own.unsafeGetTensorImpl()->set_sizes_and_strides(out.sizes(), out.strides(), 0);
        return own;
      }
    return out;
  }

  IValue taken(const IValue& value) {
    if (value.isTensor()) return taken(value.toTensor());
    if (!value.isTensorList()) return value;
    c10::List<Tensor> out;
    for (const Tensor& one : value.toTensorVector()) out.push_back(taken(one));
    return out;
  }
};

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  Call call{schema.name()};
  const size_t arguments = schema.arguments().size();
  const size_t begin = stack->size() - arguments;
  for (size_t i = begin; i < stack->size(); ++i) (*stack)[i] = call.given((*stack)[i]);
  if (kWaits.count(call.name)) counts.wait(call.name);
  {
    const at::AutoDispatchBelowAutograd below;
    op.callBoxed(stack);
  }
  const size_t returns = schema.returns().size();
  const c10::OptionalDeviceGuard guard(call.device);
  for (size_t i = stack->size() - returns; i < stack->size(); ++i) (*stack)[i] = call.taken((*stack)[i]);
  if (call.launched || !returns) counts.add(counts.launches, call.name);
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  const bool reads = from.device().type() == kType, writes = to.device().type() == kType;
  if (reads && !writes) counts.wait("copy to the CPU");
  else if (writes && !reads) counts.add(counts.uploads, "copy from the CPU");
  else if (from.device() != to.device()) counts.add(counts.launches, "copy between devices");
  else counts.add(counts.launches, "aten::copy_");
  if (from.numel()) (writes ? on_host(to) : to).copy_(reads ? on_host(from) : from);
  return to;
}

at::Scalar number(const Tensor& given) {
  counts.wait("a number");
  return on_host(given).item();
}

// GPUs count whole numbers too.
Tensor histc(const Tensor& given, int64_t bins, const at::Scalar& least, const at::Scalar& most) {
  counts.add(counts.launches, "aten::histc");
  const auto found = at::histc(on_host(given).to(at::kFloat), bins, least, most).to(given.scalar_type());
  auto out = at::empty(found.sizes(), given.options());
  on_host(out).copy_(found);
  return out;
}

std::vector<std::string> counted(const std::string& kind) {
  std::lock_guard<std::mutex> hold(counts.lock);
  const auto& of = kind == "launches" ? counts.launches : kind == "waits" ? counts.waits : counts.uploads;
  std::vector<std::string> out;
  for (const auto& [name, times] : of) out.push_back(name + " " + std::to_string(times));
  return out;
}

void reset() {
  std::lock_guard<std::mutex> hold(counts.lock);
  counts.launches.clear();
  counts.waits.clear();
  counts.uploads.clear();
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_local_scalar_dense", &number);
  m.impl("histc", &histc);
  // One launch, as on a GPU, and the CPU's own kernel.
  for (const char* name : {"scaled_dot_product_attention", "rms_norm", "convolution"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
}

TORCH_LIBRARY(standin, m) {
  m.def("start", []() {
    c10::SetAllocator(kType, &memory);
    at::RegisterPrivateUse1HooksInterface(&hooks);
  });
  m.def("available(bool yes) -> ()", [](bool yes) { available = yes; });
  m.def("counted(str kind) -> str[]", &counted);
  m.def("reset() -> ()", &reset);
  m.def("refuse_waits(bool yes) -> ()", [](bool yes) { counts.refuse_waits = yes; });
  m.def("limit(int bytes, int device) -> ()", [](int64_t bytes, int64_t device) { memory.of[device].limit = bytes; });
}
