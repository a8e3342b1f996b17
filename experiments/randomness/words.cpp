// Writes to stdout, without end, the random words that a training run consumes, in the order in which a row consumes them.
//
//     words TOKENS BLOCKS STREAM < SEEDS      # seeds as 8-byte little-endian integers, one for each step
//
// For each seed, TOKENS tokens of BLOCKS blocks (4 columns of a 32-bit type, 8 of a 16-bit one) of four 32-bit words. On
// its end, or when the reader goes away, it says on stderr how many bytes it has written.
#include <unistd.h>

#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "noise.h"

namespace {

using namespace neft::scalar;

// False if there is nobody left to read.
bool write_all(const std::vector<uint32_t>& row, uint64_t& written) {
  const char* data = reinterpret_cast<const char*>(row.data());
  size_t left = row.size() * sizeof row[0];
  while (left > 0) {
    const ssize_t done = write(STDOUT_FILENO, data, left);
    if (done < 0) return false;
    data += done;
    left -= static_cast<size_t>(done);
    written += static_cast<uint64_t>(done);
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: words TOKENS BLOCKS STREAM < SEEDS\n");
    return 2;
  }
  const int64_t tokens = std::atoll(argv[1]);
  const auto blocks = static_cast<uint32_t>(std::atoll(argv[2]));
  const auto stream = static_cast<uint32_t>(std::atoll(argv[3]));
  std::signal(SIGPIPE, SIG_IGN);

  std::vector<uint32_t> row(size_t{4} * blocks);
  uint64_t written = 0;
  int64_t seed = 0;
  bool read_on = true;
  while (read_on && std::fread(&seed, sizeof seed, 1, stdin) == 1) {
    for (int64_t token = 0; token < tokens && read_on; ++token) {
      for (uint32_t block = 0; block < blocks; ++block) {
        uint32_t c[4];
        set_counter(c, block, token, stream);
        philox4x32(c, make_key(seed));
        for (int word = 0; word < 4; ++word) row[size_t{4} * block + word] = c[word];
      }
      read_on = write_all(row, written);
    }
  }
  std::fprintf(stderr, "%llu\n", static_cast<unsigned long long>(written));
  return 0;
}
