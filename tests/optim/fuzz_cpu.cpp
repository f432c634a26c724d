// Random lengths, addresses, dtypes and settings, in memory of just the size: for the sanitizers. Each result is also
// compared with that of the elements one by one.
#include "cpu.cpp"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace {

std::mt19937_64 generator(1);
int64_t draw(int64_t most) { return (int64_t)(generator() % (uint64_t)(most + 1)); }

// A tensor at any address that its dtype may have; what lies around it belongs to the sanitizer.
struct Memory {
    std::vector<uint8_t> bytes;
    int64_t offset, width;
    Memory(int64_t count, int32_t dtype) : offset(0), width(dtype == FLOAT32 ? 4 : 2) {
        offset = width * draw(17);
        bytes.resize(offset + count * width);
        bytes.shrink_to_fit();
        for (auto &byte : bytes) byte = (uint8_t)generator();
    }
    void *at(int64_t index) { return bytes.data() + offset + index * width; }
};

}  // namespace

int main(int, char **arguments) {
    const int most = std::atoi(arguments[1]);
    int rounds = 0;
    for (; rounds < most; rounds++) {
        Settings s{};
        s.variant = draw(2), s.power = draw(3), s.stochastic = draw(1), s.has_scale = draw(1);
        s.weight_dtype = draw(1), s.gradient_dtype = draw(1), s.state_dtype = draw(1);
        s.seed = generator();
        s.primal_rate = 0.01f, s.pull = 0.002f, s.alpha = 0.01f, s.tau = 0.001f, s.eps = 1e-8f;
        s.beta1 = 0.9f, s.beta1_rest = 0.1f, s.beta2 = 0.99f, s.beta2_rest = 0.01f, s.inverse_scale = 0.5f;
        s.exponent = {0.375f, 0.0f, 0.375f}, s.inner = {1.5f, 0.0f, 1.5f}, s.root = {0.625f, 0.0f, 0.625f};
        s.log_alpha_whole = -7.0f, s.log_alpha_fraction = 0.356f;
        std::vector<Memory> memory;
        std::vector<Tensors> tensors, ones;
        std::vector<int64_t> steps(3), single_steps;
        std::vector<Memory> copies;
        int64_t sizes[3], total = 0;
        for (auto &size : sizes) total += size = draw(3) ? draw(300) : draw(3);
        memory.reserve(12), copies.reserve(12), single_steps.resize(total + 1);
        for (int i = 0; i < 3; i++) {
            for (int32_t dtype : {s.weight_dtype, s.gradient_dtype, s.state_dtype, s.state_dtype}) {
                memory.emplace_back(sizes[i], dtype);
                copies.push_back(memory.back());
            }
            Memory *of = &memory[4 * i], *copy = &copies[4 * i];
            tensors.push_back({of[0].at(0), of[1].at(0), of[2].at(0), of[3].at(0), &steps[i], sizes[i]});
            for (int64_t k = 0; k < sizes[i]; k++) {
                int64_t *step = &single_steps[ones.size()];
                ones.push_back({copy[0].at(k), copy[1].at(k), copy[2].at(k), copy[3].at(k), step, 1});
            }
        }
        stacey_step(&s, tensors.data(), 3, 1 + draw(3));
        stacey_step(&s, ones.data(), (int64_t)ones.size(), 1);
        for (int i = 0; i < 12; i++) {
            if (memory[i].bytes != copies[i].bytes) {
                std::fprintf(stderr, "round %d: tensor %d differs from its elements one by one\n", rounds, i);
                return 1;
            }
        }
    }
    std::printf("%d rounds\n", rounds);
}
