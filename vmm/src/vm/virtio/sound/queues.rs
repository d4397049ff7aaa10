//! The queues of a sound device: takes the guest's messages off them and puts answers on them (virtio 1.2, section
//! 5.14.6). Invariants: a message of the tx and rx queues is either in the guest's hands or in `waiting`, under the
//! token by which the shadow knows it; no more of a queue are there than the queue has descriptors, though a hostile driver
//! offers one again and again.

use std::collections::HashMap;

use umbra_shadow::sound::params::MAX_BUFFER_BYTES;
use umbra_shadow::sound::{Done, StreamId, Token};
use umbra_splitter::copy::{gather, scatter};
use umbra_splitter::queue::{Chain, RingFault, Virtqueue};

use super::request::{MAX_REQUEST, Status};
use super::{CONTROL, RX, TX};

/// Bytes of `struct virtio_snd_pcm_xfer`, before the samples.
const XFER_BYTES: usize = 4;
/// Bytes of `struct virtio_snd_pcm_status`, behind them.
const STATUS_BYTES: usize = 8;

/// What the guest wants.
#[derive(Debug)]
pub(super) enum Message {
    /// Nothing: the queue is empty.
    None,
    /// Nothing that is a message; it is answered already.
    Malformed,
    /// Samples to play.
    Play(StreamId, Token, Vec<u8>),
    /// Room for samples, in bytes.
    Record(StreamId, Token, usize),
}

/// A control request, to be answered at once.
#[derive(Debug)]
pub(super) struct Control {
    head: u16,
    /// The request; empty if it is longer than any.
    pub(super) bytes: Vec<u8>,
}

#[derive(Debug, Default)]
pub(super) struct Queues {
    active: [Option<Virtqueue>; 4],
    /// Queue and chain head of each message that the shadow has.
    waiting: HashMap<u32, (u16, u16)>,
    next_token: u32,
}

impl Queues {
    pub(super) fn start(&mut self, index: u16, queue: Virtqueue) {
        if let Some(place) = self.active.get_mut(usize::from(index)) {
            *place = Some(queue);
        }
    }

    pub(super) fn stop(&mut self, index: u16) -> Option<Virtqueue> {
        self.waiting.retain(|_, (queue, _)| *queue != index);
        self.active.get_mut(usize::from(index))?.take()
    }

    fn queue(&mut self, index: u16) -> Option<&mut Virtqueue> {
        self.active.get_mut(usize::from(index))?.as_mut()
    }

    /// Takes the next chain of a queue; asks for a kick where there is none.
    fn pop(&mut self, index: u16) -> Result<Option<u16>, RingFault> {
        let Some(queue) = self.queue(index) else { return Ok(None) };
        let mut ring = queue.open()?;
        if ring.available()? == 0 && !ring.listen(0)? {
            return Ok(None);
        }
        let head = ring.head(0)?;
        ring.take(1);
        Ok(Some(head))
    }

    /// The next control request.
    pub(super) fn next_control(&mut self) -> Result<Option<Control>, RingFault> {
        let Some(head) = self.pop(CONTROL)? else { return Ok(None) };
        let mut bytes = Vec::new();
        if let Some(queue) = self.queue(CONTROL) {
            let mut chain = Chain::default();
            if queue.open()?.walk(head, &mut chain).is_ok() && chain.readable_len() <= MAX_REQUEST {
                bytes.resize(chain.readable_len(), 0);
                gather(chain.readable(), 0, &mut bytes);
            }
        }
        Ok(Some(Control { head, bytes }))
    }

    /// Answers a control request with a status and what belongs to it.
    pub(super) fn answer(&mut self, control: &Control, answer: &Result<Vec<u8>, Status>) -> Result<(), RingFault> {
        let Some(queue) = self.queue(CONTROL) else { return Ok(()) };
        let mut ring = queue.open()?;
        let mut chain = Chain::default();
        let mut written = 0;
        if ring.walk(control.head, &mut chain).is_ok() {
            let (status, body) = match answer {
                Ok(body) if chain.writable_len() >= 4 + body.len() => (Status::Ok, &body[..]),
                Ok(_) => (Status::BadMessage, &[][..]),
                Err(status) => (*status, &[][..]),
            };
            // Less than a status fits only where the guest has no room for an answer.
            written = scatter(&(status as u32).to_le_bytes(), chain.writable(), 0);
            written += scatter(body, chain.writable(), written);
        }
        ring.complete(control.head, u32::try_from(written).unwrap_or(0))
    }

    /// The next message of the tx or rx queue.
    pub(super) fn next_message(&mut self, index: u16) -> Result<Message, RingFault> {
        let Some(head) = self.pop(index)? else { return Ok(Message::None) };
        let size = self.queue(index).map_or(0, |queue| queue.size());
        if self.waiting.values().filter(|(of, _)| *of == index).count() >= usize::from(size) {
            return Err(RingFault::InFlight { size });
        }
        let token = Token(self.next_token);
        self.next_token = self.next_token.wrapping_add(1);
        self.waiting.insert(token.0, (index, head));
        let Some(queue) = self.queue(index) else { return Ok(Message::None) };
        let message = read_message(queue, head, index, token)?;
        if message.is_none() {
            self.finish(token, Status::BadMessage, 0, &[])?;
        }
        Ok(message.unwrap_or(Message::Malformed))
    }

    /// Gives messages back that the shadow is done with.
    pub(super) fn give_back(&mut self, done: Vec<Done>) -> Result<(), RingFault> {
        for Done { token, outcome, latency_bytes, samples } in done {
            self.finish(token, outcome.into(), latency_bytes, &samples)?;
        }
        Ok(())
    }

    fn finish(&mut self, token: Token, status: Status, latency: u32, samples: &[u8]) -> Result<(), RingFault> {
        // Nothing waits under it if its queue was stopped meanwhile.
        let Some((index, head)) = self.waiting.remove(&token.0) else { return Ok(()) };
        let Some(queue) = self.queue(index) else { return Ok(()) };
        let mut ring = queue.open()?;
        let mut chain = Chain::default();
        let mut written = 0;
        if ring.walk(head, &mut chain).is_ok()
            && let Some(room) = chain.writable_len().checked_sub(STATUS_BYTES)
        {
            let mut end = [0; STATUS_BYTES];
            end[..4].copy_from_slice(&(status as u32).to_le_bytes());
            end[4..].copy_from_slice(&latency.to_le_bytes());
            // The driver may have changed the chain since; what no longer fits is its loss.
            written = scatter(&samples[..samples.len().min(room)], chain.writable(), 0);
            written += scatter(&end, chain.writable(), room);
        }
        ring.complete(head, u32::try_from(written).unwrap_or(0))
    }

    /// Whether the guest has taken all that it got back, as far as it shows.
    pub(super) fn all_taken(&mut self) -> Result<bool, RingFault> {
        self.active.iter_mut().flatten().try_fold(true, |all, queue| Ok(all && queue.open()?.all_taken()?))
    }

    /// Interrupts the guest where it waits.
    pub(super) fn notify(&mut self) -> Result<(), RingFault> {
        self.active.iter_mut().flatten().try_for_each(Virtqueue::notify)
    }
}

/// Takes a message apart; `None` if it is none.
fn read_message(queue: &mut Virtqueue, head: u16, index: u16, token: Token) -> Result<Option<Message>, RingFault> {
    let mut chain = Chain::default();
    if queue.open()?.walk(head, &mut chain).is_err() {
        return Ok(None);
    }
    let bytes = chain.readable_len().checked_sub(XFER_BYTES);
    let room = chain.writable_len().checked_sub(STATUS_BYTES);
    let (Some(bytes), Some(room)) = (bytes, room) else { return Ok(None) };
    if bytes.max(room) > MAX_BUFFER_BYTES as usize {
        return Ok(None);
    }
    let mut stream = [0; XFER_BYTES];
    gather(chain.readable(), 0, &mut stream);
    let Ok(stream) = u16::try_from(u32::from_le_bytes(stream)).map(StreamId) else { return Ok(None) };
    Ok(match index {
        TX => {
            let mut samples = vec![0; bytes];
            gather(chain.readable(), XFER_BYTES, &mut samples);
            Some(Message::Play(stream, token, samples))
        }
        RX => Some(Message::Record(stream, token, room)),
        _ => None,
    })
}
