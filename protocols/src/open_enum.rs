//! The one macro of this crate: enums that stay open.
//!
//! A value that arrives from another party can be any integer. An open enum is a transparent
//! newtype over that integer with named constants, so that an unknown value survives reading,
//! comparing and printing.

/// Defines an open enum: `open_enum! { /// doc \n pub struct Name(u32) { /// doc \n ONE = 1, } }`.
///
/// The type gets `name()` (the constant's name, if known), `is_known()`, a `Debug` that prints
/// the name or the number, and the zerocopy traits of its integer.
macro_rules! open_enum {
    (
        $(#[$meta:meta])*
        $vis:vis struct $name:ident($repr:ty) {
            $( $(#[$const_meta:meta])* $constant:ident = $value:expr, )+
        }
    ) => {
        $(#[$meta])*
        #[derive(
            Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash,
            ::zerocopy::FromBytes, ::zerocopy::IntoBytes,
            ::zerocopy::Immutable, ::zerocopy::KnownLayout,
        )]
        #[repr(transparent)]
        $vis struct $name(
            /// The value as it is on the wire.
            pub $repr
        );

        impl $name {
            $( $(#[$const_meta])* pub const $constant: Self = Self($value); )+

            /// The name of the constant with this value, if there is one.
            #[must_use]
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $( value if value == Self::$constant.0 => Some(stringify!($constant)), )+
                    _ => None,
                }
            }

            /// Whether the value is one of the constants.
            #[must_use]
            pub const fn is_known(self) -> bool {
                self.name().is_some()
            }
        }

        impl ::core::fmt::Debug for $name {
            fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                match self.name() {
                    Some(name) => write!(f, "{}({name})", stringify!($name)),
                    None => write!(f, "{}({:#x})", stringify!($name), self.0),
                }
            }
        }

        impl ::core::convert::From<$repr> for $name {
            fn from(value: $repr) -> Self {
                Self(value)
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use std::format;

    open_enum! {
        /// For the tests below.
        struct Colour(u8) {
            /// Known.
            RED = 1,
            /// Known as well.
            GREEN = 7,
        }
    }

    #[test]
    fn known_values_have_names_and_unknown_values_survive() {
        assert_eq!(Colour::GREEN.name(), Some("GREEN"));
        assert_eq!(format!("{:?}", Colour::from(1)), "Colour(RED)");
        let unknown = Colour::from(0xEE);
        assert!(!unknown.is_known());
        assert_eq!(unknown.0, 0xEE);
        assert_eq!(format!("{unknown:?}"), "Colour(0xee)");
    }
}
