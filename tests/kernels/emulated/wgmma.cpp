// wgmma.cuh, what of it no macro of a kernel changes.

#include "wgmma.cuh"

static Products& products_of_warp() { return this_emulated_block->products[this_fiber->thread / 32]; }

void wgmma_begin() {
  by_warp([](Fiber**) { products_of_warp().has_begun = true; });
}

void wgmma_commit() {
  by_warp([](Fiber**) {
    products_of_warp().num_committed++;
    products_of_warp().has_begun = false;
  });
}

void wait_for_products(int most_left) {
  by_warp([=](Fiber**) { products_of_warp().wait_for(products_of_warp().num_committed - most_left); });
}

// 16 bytes of a row of 128: bits 7 to 9 of an address are added to bits 4 to 6, without carry.
static const u8* swizzled(Block& block, u32 at) { return shared_at(block, at ^ at / 128 % 8 * 16, 16); }

// d = a b, or d += a b, of a warp's 16 rows: operands as of `product` in ptx.cuh, but for b.
template <class Value, class Sum, class OfLeft, class OfRight>
static void product(void* d, int tiles, const u32 (&a)[4], u32 b, bool keeps, const OfLeft& of_left,
                    const OfRight& of_right) {
  constexpr int PACKED = std::is_same_v<Value, double> ? 2 : 4, COLUMNS = PACKED * 8;
  u32* const words = (u32*)d;
  const auto found = this_fiber->sums.find(d);
  const bool is_new = !keeps || found == this_fiber->sums.end();
  if (is_new) this_fiber->sums[d] = {std::vector<u32>(words, words + tiles * 4), 0};
  for (int i = 0; i < tiles * 4; i++) {
    if (!is_new && words[i] != NO_SUM) fail("sums of products that are overwritten, and not held before");
    words[i] = NO_SUM;
  }
  u64* const operands = this_fiber->operands;
  operands[0] = (u64)&this_fiber->sums[d], operands[1] = (u64)a, operands[2] = b;
  by_warp([=](Fiber** lanes) {
    Block* const block = this_emulated_block;
    Products& products = products_of_warp();
    if (!products.has_begun) fail("a product without wgmma_begin");
    const u32 first = b % (1 << 14) * 16;
    if (b >> 14 != 4) fail("a descriptor that is none of x_descriptor's");
    if (first % 128 + 32 > 128 || first / 128 % 8) fail("an operand across the end of its rows");
    std::vector<Sums*> sums;
    std::vector<const u32*> registers;
    for (int l = 0; l < 32; l++) {
      sums.push_back((Sums*)lanes[l]->operands[0]);
      sums.back()->last_group = products.num_committed;
      registers.push_back((const u32*)lanes[l]->operands[1]);
      if (lanes[l]->operands[2] != b) fail("lanes that do not describe the same operand");
    }
    const auto compute = [=]() {
      Value left[16][COLUMNS];
      for (int l = 0; l < 32; l++) {
        for (int i = 0; i < PACKED * 4; i++) {
          const int r = i / PACKED, col = l % 4 * PACKED + i % PACKED + r / 2 * COLUMNS / 2;
          left[l / 4 + r % 2 * 8][col] = of_left(registers[l][r] >> i % PACKED * (32 / PACKED));
        }
      }
      for (int token = 0; token < tiles * 8; token++) {
        Value right[COLUMNS];
        for (int k = 0; k < COLUMNS; k++) {
          const u32 byte = k * (4 / PACKED);
          u32 word = 0;
          memcpy(&word, swizzled(*block, first + token * 128 + byte / 16 * 16) + byte % 16, 4 / PACKED);
          right[k] = of_right(word);
        }
        for (int row = 0; row < 16; row++) {
          u32& word = sums[row % 8 * 4 + token % 8 / 2]->words[token / 8 * 4 + row / 8 * 2 + token % 2];
          const Sum before = keeps ? bits_of<Sum>(word) : 0;
          word = bits_of<u32>(added(before, left[row], right));
        }
      }
    };
    products.under_way.push_back({products.num_committed, compute});
    products.operands.push_back({products.num_committed, first / 128 * 128, first / 128 * 128 + tiles * 1024});
    products.issued.push_back(b | (u64)(tiles * 8 + PACKED) << 32 | (u64)keeps << 48);
    while (!products.under_way.empty() && block->draw() % 4 == 0) products.compute_first();
  });
}

static double bf16_value(u32 bits) { return bf16_to_float(bits & 0xFFFF); }
static int signed_byte(u32 bits) { return (signed char)bits; }
static int unsigned_byte(u32 bits) { return (u8)bits; }

void warpgroup_product(Values kind, void* d, int tiles, const u32 (&a)[4], u32 b, bool keeps) {
  if (kind == Values::bf16) product<double, float>(d, tiles, a, b, keeps, bf16_value, bf16_value);
  if (kind == Values::s8) product<int, int>(d, tiles, a, b, keeps, signed_byte, signed_byte);
  if (kind == Values::u8s8) product<int, int>(d, tiles, a, b, keeps, unsigned_byte, signed_byte);
}

void hold_sums(void* d, size_t bytes) {
  const auto found = this_fiber->sums.find(d);
  if (found == this_fiber->sums.end()) return;
  if (found->second.last_group >= products_of_warp().num_awaited) fail("sums of products that are under way");
  memcpy(d, found->second.words.data(), bytes);
  this_fiber->sums.erase(found);
}
