// Functions that must be inlined, for one of two reasons. The compiler keeps the variables of a vector loop in
// registers only while no other function can reach them. And the linker keeps one copy of a function that several
// instruction sets share outside their namespaces: that copy may contain instructions that the processor lacks.
#pragma once

#define RW_INLINED __attribute__((always_inline))
#define RW_INLINE inline RW_INLINED
