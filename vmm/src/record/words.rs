//! How events and crash reports write types that the wire writes in another form. Each module is for `#[serde(with = ..)]`.

/// A guest's device as its name: `net0`.
pub(super) mod device {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use umbra_shadow::DeviceId;

    pub(crate) fn serialize<S: Serializer>(device: &DeviceId, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(device)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<DeviceId, D::Error> {
        let name = String::deserialize(from)?;
        name.parse().map_err(|_| D::Error::custom(format_args!("no device: {name}")))
    }
}

/// The end of a link as text: `closed`, or what went wrong. Read back, every other text is a broken rule.
pub(super) mod cause {
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::wire::messages::LinkEnd;

    pub(crate) fn serialize<S: Serializer>(cause: &LinkEnd, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(cause)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<LinkEnd, D::Error> {
        let text = String::deserialize(from)?;
        let closed = text == LinkEnd::Closed.to_string();
        Ok(if closed { LinkEnd::Closed } else { LinkEnd::Broken(text) })
    }
}

/// A reset method as its word; `none` where there is none.
pub(super) mod reset_method {
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::host::reset::{self, ResetMethod};

    pub(crate) fn serialize<S: Serializer>(method: &Option<ResetMethod>, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(reset::word(*method))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<ResetMethod>, D::Error> {
        let word = String::deserialize(from)?;
        Ok((word != reset::word(None)).then(|| ResetMethod::from_word(&word)))
    }
}
