/* What every check needs: random numbers, items of any dtype, memory of exact size, and a way to complain. */
#include "helpers.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

uint64_t random_bits(random_source* source) {
  uint64_t x = source->state += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

int64_t random_int(random_source* source, int64_t low, int64_t high) {
  return low + (int64_t)(random_bits(source) % (uint64_t)(high - low + 1));
}

int random_once_in(random_source* source, int64_t times) { return random_int(source, 1, times) == 1; }

typedef struct {
  int bytes, exponent_bits, mantissa_bits;
} number_format;

static number_format format_of(int32_t dtype) {
  switch (dtype) {
    case SPECPREFILL_F16: return (number_format){2, 5, 10};
    case SPECPREFILL_BF16: return (number_format){2, 8, 7};
    case SPECPREFILL_F8_E4M3FN: return (number_format){1, 4, 3};
    case SPECPREFILL_F8_E5M2: return (number_format){1, 5, 2};
    default: return (number_format){4, 8, 23};
  }
}

int64_t item_size(int32_t dtype) { return format_of(dtype).bytes; }

void write_random(random_source* source, void* data, int32_t dtype, int64_t index) {
  const number_format format = format_of(dtype);
  const int64_t bias = (1 << (format.exponent_bits - 1)) - 1;
  const uint64_t exponent = (uint64_t)random_int(source, bias - 5, bias);
  const uint64_t mantissa = random_bits(source) & ((1u << format.mantissa_bits) - 1);
  const uint64_t sign = random_bits(source) & 1;
  const uint32_t bits = (uint32_t)(((sign << format.exponent_bits | exponent) << format.mantissa_bits) | mantissa);
  for (int i = 0; i < format.bytes; ++i) ((uint8_t*)data)[index * format.bytes + i] = (uint8_t)(bits >> (8 * i));
}

double read_item(const void* data, int32_t dtype, int64_t index) {
  const number_format format = format_of(dtype);
  uint32_t bits = 0;
  for (int i = 0; i < format.bytes; ++i) {
    bits |= (uint32_t)((const uint8_t*)data)[index * format.bytes + i] << (8 * i);
  }
  const int bias = (1 << (format.exponent_bits - 1)) - 1;
  const int exponent = (int)(bits >> format.mantissa_bits) & ((1 << format.exponent_bits) - 1);
  double value = 1.0 + (double)(bits & ((1u << format.mantissa_bits) - 1)) / (double)(1u << format.mantissa_bits);
  for (int i = exponent; i < bias; ++i) value /= 2;
  for (int i = bias; i < exponent; ++i) value *= 2;
  return bits >> (format.exponent_bits + format.mantissa_bits) & 1 ? -value : value;
}

void* exact(int64_t bytes) {
  void* memory = malloc(bytes > 0 ? (size_t)bytes : 1);
  if (memory == NULL) {
    fprintf(stderr, "out of memory: %lld bytes\n", (long long)bytes);
    exit(2);
  }
  return memory;
}

int32_t* exact_int32(int64_t count) { return exact(count * (int64_t)sizeof(int32_t)); }

int32_t* random_block_table(random_source* source, int64_t count, int64_t width, int64_t num_blocks) {
  int32_t* shuffled = exact_int32(num_blocks);
  for (int64_t i = 0; i < num_blocks; ++i) shuffled[i] = (int32_t)i;
  for (int64_t i = num_blocks - 1; i > 0; --i) {
    const int64_t j = random_int(source, 0, i);
    const int32_t swap = shuffled[i];
    shuffled[i] = shuffled[j];
    shuffled[j] = swap;
  }
  int32_t* table = exact_int32(count * width);
  memcpy(table, shuffled, (size_t)(count * width) * sizeof(int32_t));
  free(shuffled);
  return table;
}

int refused(int status, const char* what) {
  if (status != SPECPREFILL_INVALID_ARGUMENT && status != SPECPREFILL_OUT_OF_MEMORY) {
    return report("%s: expected to be refused, got status %d", what, status);
  }
  return specprefill_last_error()[0] == '\0' ? report("%s: refused without a reason", what) : 0;
}

int refused_contents(int status, const char* what) { return refused(status, what); }

int accepted(int status, const char* what) {
  if (status != SPECPREFILL_OK) return report("%s: %s", what, specprefill_last_error());
  return specprefill_last_error()[0] != '\0' ? report("%s: left the reason \"%s\"", what, specprefill_last_error()) : 0;
}

int report(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fputc('\n', stderr);
  return 1;
}
