// As in the toolkit, where the compiler has what follows, and not the library.
#pragma once
#include "crt/mma.h"
