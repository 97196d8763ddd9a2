// Gives back what macros_off.hpp has set aside.

// Qt
#pragma pop_macro("emit")
#pragma pop_macro("slots")
#pragma pop_macro("signals")
#pragma pop_macro("foreach")
#pragma pop_macro("forever")

// windows.h
#pragma pop_macro("min")
#pragma pop_macro("max")
#pragma pop_macro("small")
#pragma pop_macro("near")
#pragma pop_macro("far")
#pragma pop_macro("interface")
#pragma pop_macro("IN")
#pragma pop_macro("OUT")
#pragma pop_macro("OPTIONAL")
#pragma pop_macro("ERROR")
#pragma pop_macro("DELETE")

// X11
#pragma pop_macro("Success")
#pragma pop_macro("Status")
#pragma pop_macro("None")
#pragma pop_macro("Bool")
#pragma pop_macro("True")
#pragma pop_macro("False")
#pragma pop_macro("Always")
#pragma pop_macro("Above")
#pragma pop_macro("Below")
#pragma pop_macro("Complex")
#pragma pop_macro("Convex")
#pragma pop_macro("Unsorted")

// macOS
#pragma pop_macro("check")
#pragma pop_macro("verify")
#pragma pop_macro("require")
#pragma pop_macro("nil")

// Arduino
#pragma pop_macro("abs")
#pragma pop_macro("round")
#pragma pop_macro("sq")
#pragma pop_macro("bit")
#pragma pop_macro("word")
#pragma pop_macro("F")
#pragma pop_macro("PI")
#pragma pop_macro("radians")
#pragma pop_macro("degrees")
#pragma pop_macro("constrain")
#pragma pop_macro("HIGH")
#pragma pop_macro("LOW")

// C and POSIX
#pragma pop_macro("I")
#pragma pop_macro("index")
#pragma pop_macro("border")
#pragma pop_macro("major")
#pragma pop_macro("minor")
