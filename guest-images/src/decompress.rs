//! Whole-buffer decompression by magic number: gzip, XZ, LZMA, zstd, LZ4 (legacy frame, as kernels use it).
//!
//! The invariant: no result is larger than the caller's limit, whatever the input claims.

use std::io::{self, Read};

/// A compression format that kernels, modules or firmware files come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// gzip.
    Gzip,
    /// XZ.
    Xz,
    /// LZMA "alone".
    Lzma,
    /// Zstandard.
    Zstd,
    /// LZ4 legacy frames (`lz4 -l`).
    Lz4Legacy,
    /// bzip2; recognised, not supported.
    Bzip2,
    /// LZO; recognised, not supported.
    Lzo,
}

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum DecompressError {
    /// The format is known, but no kernel in use today needs it.
    #[error("{0:?} compression is not supported (gzip, XZ, LZMA, zstd and LZ4 are)")]
    Unsupported(Format),
    /// The data is damaged or cut short.
    #[error("the {format:?} data is damaged or cut short")]
    Damaged {
        /// The format that it claims to be.
        format: Format,
        /// The decoder's word.
        #[source]
        source: io::Error,
    },
    /// More than the limit came out.
    #[error("the unpacked data is larger than {limit} bytes")]
    TooLarge {
        /// The caller's limit.
        limit: usize,
    },
}

/// Most memory of an XZ or LZMA decoder, in bytes, whatever dictionary the data claims to need (up to 4 GiB). Kernels are packed
/// with one of 128 MiB.
const XZ_MEMORY: u64 = 256 << 20;

/// Block size of an LZ4 legacy frame: every block but the last unpacks to exactly this.
const LZ4_LEGACY_BLOCK: usize = 8 << 20;
const LZ4_LEGACY_MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];

impl Format {
    /// Tells the format by the first bytes; `None` when it is none of them.
    pub fn detect(bytes: &[u8]) -> Option<Self> {
        const MAGICS: [(&[u8], Format); 7] = [
            (&[0x1f, 0x8b], Format::Gzip),
            (&[0xfd, b'7', b'z', b'X', b'Z', 0], Format::Xz),
            (&[0x5d, 0, 0], Format::Lzma),
            (&[0x28, 0xb5, 0x2f, 0xfd], Format::Zstd),
            (&LZ4_LEGACY_MAGIC, Format::Lz4Legacy),
            (b"BZh", Format::Bzip2),
            (&[0x89, b'L', b'Z', b'O'], Format::Lzo),
        ];
        MAGICS.iter().find(|(magic, _)| bytes.starts_with(magic)).map(|&(_, format)| format)
    }
}

/// Unpacks `bytes`, which are in `format`.
///
/// # Errors
/// Unsupported format, damaged data, or a result of more than `limit` bytes.
pub fn decompress(format: Format, bytes: &[u8], limit: usize) -> Result<Vec<u8>, DecompressError> {
    let damaged = |source| DecompressError::Damaged { format, source };
    match format {
        Format::Gzip => read_bounded(flate2::read::MultiGzDecoder::new(bytes), format, limit),
        Format::Xz => {
            let stream = xz_stream().map_err(damaged)?;
            read_bounded(liblzma::read::XzDecoder::new_stream(bytes, stream), format, limit)
        }
        Format::Lzma => {
            let stream = liblzma::stream::Stream::new_lzma_decoder(XZ_MEMORY).map_err(|e| damaged(e.into()))?;
            read_bounded(liblzma::read::XzDecoder::new_stream(bytes, stream), format, limit)
        }
        Format::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(bytes).map_err(damaged)?;
            // Kernels are packed with `--ultra -22`, whose window is 128 MiB.
            decoder.window_log_max(27).map_err(damaged)?;
            read_bounded(decoder, format, limit)
        }
        Format::Lz4Legacy => lz4_legacy(bytes, limit),
        Format::Bzip2 | Format::Lzo => Err(DecompressError::Unsupported(format)),
    }
}

/// Unpacks `bytes` if they begin with a known magic number, else returns them as they are.
///
/// # Errors
/// As [`decompress`].
pub fn decompress_any(bytes: Vec<u8>, limit: usize) -> Result<Vec<u8>, DecompressError> {
    match Format::detect(&bytes) {
        Some(format) => decompress(format, &bytes, limit),
        None if bytes.len() > limit => Err(DecompressError::TooLarge { limit }),
        None => Ok(bytes),
    }
}

/// A decoder of XZ streams, one behind the other, with bounded memory.
pub(crate) fn xz_stream() -> io::Result<liblzma::stream::Stream> {
    Ok(liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY, liblzma::stream::CONCATENATED)?)
}

fn read_bounded(reader: impl Read, format: Format, limit: usize) -> Result<Vec<u8>, DecompressError> {
    let mut out = Vec::new();
    reader
        .take(limit as u64 + 1)
        .read_to_end(&mut out)
        .map_err(|source| DecompressError::Damaged { format, source })?;
    if out.len() > limit { Err(DecompressError::TooLarge { limit }) } else { Ok(out) }
}

fn lz4_legacy(bytes: &[u8], limit: usize) -> Result<Vec<u8>, DecompressError> {
    let damaged = |what: String| DecompressError::Damaged { format: Format::Lz4Legacy, source: io::Error::other(what) };
    let mut rest = bytes;
    let mut out = Vec::new();
    while let Some((word, tail)) = rest.split_first_chunk::<4>() {
        rest = tail;
        if *word == LZ4_LEGACY_MAGIC {
            continue; // frames may follow each other
        }
        let length = u32::from_le_bytes(*word) as usize;
        let block = rest.get(..length).ok_or_else(|| damaged(format!("a block of {length} bytes is cut short")))?;
        rest = &rest[length..];
        let unpacked = lz4_flex::block::decompress(block, LZ4_LEGACY_BLOCK).map_err(|e| damaged(e.to_string()))?;
        out.extend_from_slice(&unpacked);
        if out.len() > limit {
            return Err(DecompressError::TooLarge { limit });
        }
    }
    if rest.is_empty() { Ok(out) } else { Err(damaged("stray bytes after the last block".into())) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn lz4(data: &[u8]) -> Vec<u8> {
        let mut out = LZ4_LEGACY_MAGIC.to_vec();
        for chunk in data.chunks(LZ4_LEGACY_BLOCK) {
            let block = lz4_flex::block::compress(chunk);
            out.extend_from_slice(&u32::try_from(block.len()).unwrap().to_le_bytes());
            out.extend_from_slice(&block);
        }
        out
    }

    #[test]
    fn every_supported_format_comes_back() {
        let data: Vec<u8> = (0..300_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        let xz = liblzma::encode_all(&data[..], 1).unwrap();
        for packed in [gzip(&data), xz, zstd::encode_all(&data[..], 1).unwrap(), lz4(&data)] {
            assert_eq!(decompress_any(packed, data.len()).unwrap(), data);
        }
    }

    #[test]
    fn the_limit_holds_for_every_format() {
        let data = vec![0u8; 1 << 20];
        let xz = liblzma::encode_all(&data[..], 1).unwrap();
        for packed in [gzip(&data), xz, zstd::encode_all(&data[..], 1).unwrap(), lz4(&data)] {
            assert!(matches!(decompress_any(packed, data.len() - 1), Err(DecompressError::TooLarge { .. })));
        }
    }

    #[test]
    fn what_is_not_packed_is_bounded_as_well() {
        assert!(matches!(decompress_any(vec![1; 101], 100), Err(DecompressError::TooLarge { limit: 100 })));
        assert_eq!(decompress_any(vec![1; 100], 100).unwrap().len(), 100);
    }

    #[test]
    fn a_decoder_s_memory_is_bounded() {
        // LZMA "alone": properties, a dictionary of 2 GiB, and an unknown length.
        let mut claims = vec![0x5d];
        claims.extend_from_slice(&(2u32 << 30).to_le_bytes());
        claims.extend_from_slice(&[0xff; 8]);
        claims.extend_from_slice(&[0; 32]);
        let outcome = decompress(Format::Lzma, &claims, 1 << 20);
        let Err(DecompressError::Damaged { source, .. }) = outcome else { panic!("{outcome:?}") };
        assert_eq!(source.to_string(), "memory limit reached");
    }

    #[test]
    fn cut_data_is_an_error() {
        let data: Vec<u8> = (0..100_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        let xz = liblzma::encode_all(&data[..], 1).unwrap();
        for mut packed in [gzip(&data), xz, zstd::encode_all(&data[..], 1).unwrap(), lz4(&data)] {
            packed.truncate(packed.len() / 2);
            assert!(matches!(decompress_any(packed, 1 << 24), Err(DecompressError::Damaged { .. })));
        }
    }
}
