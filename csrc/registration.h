// Registration of the kernels with PyTorch. It happens at run time, so that one binary serves every copy of the package: each
// copy registers the kernels in a namespace of its own. torch's macro STABLE_TORCH_LIBRARY_IMPL fixes the namespace at
// compile time, and two copies in one process would then register the same kernels twice.
#pragma once
#include <torch/csrc/stable/library.h>

namespace neft {

// A kernel of this extension. All of them form a list, which static objects fill when the extension is loaded:
//   static const Registration registration("OP.BACKEND", TORCH_BOX(&function));
class Registration {
 public:
  using Kernel = void (*)(StableIValue*, uint64_t, uint64_t);

  Registration(const char* name, Kernel kernel) : name_(name), kernel_(kernel), next_(last()) { last() = this; }
  Registration(const Registration&) = delete;
  Registration& operator=(const Registration&) = delete;

  // Registers all kernels for `dispatch_key` in torch.ops.<name_space>. They stay registered until the process ends.
  static void register_all(const char* name_space, const char* dispatch_key) {
    using torch::stable::detail::StableLibrary;
    auto* library = new StableLibrary(StableLibrary::Kind::IMPL, name_space, dispatch_key, __FILE__, __LINE__);
    for (const Registration* each = last(); each != nullptr; each = each->next_) library->impl(each->name_, each->kernel_);
  }

 private:
  static const Registration*& last() {
    static const Registration* registration = nullptr;
    return registration;
  }

  const char* name_;
  Kernel kernel_;
  const Registration* next_;
};

}  // namespace neft
