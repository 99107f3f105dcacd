// torch.ops.quaver.philox_* on the CPU. Schemas: kernels/philox/op.py.
#include "cpu/noise_source.h"
#include "cpu/output.h"

namespace {

using namespace quaver;
using torch::stable::parallel_for;

// out is [n] or [P, n], contiguous; each member's elements are offset .. offset + n - 1 of its own source.
void philox_fill_(Tensor& out, const Tensor& seed, int64_t stream, int64_t domain, int64_t offset) {
  const auto members = cpu::sources(seed, stream, domain);
  const int64_t each = out.numel() / std::max<int64_t>(1, int64_t(members.size()));
  const auto& loops = cpu::philox_loops();
  const auto& loops_of_dtype = cpu::loops_of(out.scalar_type());
  const bool is_float = out.scalar_type() == ScalarType::Float;
  char* to = cpu::output<char>(out);
  parallel_for(0, out.numel(), cpu::kGrain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t member = begin / each, stop = std::min(end, (member + 1) * each);
      const Source& source = members[size_t(member)];
      const int64_t start = member * each;
      if (is_float) {
        loops.fill(reinterpret_cast<float*>(to) + begin, stop - begin, source, uint64_t(offset + begin - start));
      } else {
        cpu::for_tiles(uint64_t(offset - start), begin, stop, [&](uint64_t element, int64_t at, int64_t length) {
          alignas(64) float noise[cpu::kTile];
          loops.fill(noise, length, source, element);
          loops_of_dtype.narrow(to, at, noise, length);
        });
      }
      begin = stop;
    }
  });
}

void philox_words_(Tensor& out, const Tensor& seed, int64_t stream, int64_t domain, int64_t block, int64_t word) {
  const auto members = cpu::sources(seed, stream, domain);
  const int64_t each = out.numel() / std::max<int64_t>(1, int64_t(members.size()));
  const auto& loops = cpu::philox_loops();
  int64_t* to = cpu::output<int64_t>(out);
  for (size_t member = 0; member < members.size(); member++) {
    parallel_for(0, each, cpu::kGrain, [&](int64_t begin, int64_t end) {
      const uint64_t first = uint64_t(begin + word);
      loops.words(to + int64_t(member) * each + begin, end - begin, members[member], uint64_t(block) + first / 4,
                  int(first % 4));
    });
  }
}

void philox_keys_(Tensor& out, const Tensor& seed, int64_t stream) {
  const auto source = cpu::sources(seed, stream, kPermutation);
  const auto& loops = cpu::philox_loops();
  int64_t* to = cpu::output<int64_t>(out);
  parallel_for(0, out.numel(), cpu::kGrain,
               [&](int64_t begin, int64_t end) { loops.keys(to + begin, end - begin, source[0], uint64_t(begin)); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(quaver, CPU, m) {
  m.impl("philox_fill_", TORCH_BOX(&philox_fill_));
  m.impl("philox_words_", TORCH_BOX(&philox_words_));
  m.impl("philox_keys_", TORCH_BOX(&philox_keys_));
}
