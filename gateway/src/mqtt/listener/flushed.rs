//! A writer for streams that keep what they took: it says that bytes are written when they are on
//! their way.
//!
//! TLS and WebSocket streams encrypt and frame into a buffer of their own, and say `Ready` while the
//! socket takes no more; without a flush the rest would wait for the next write, and an ack with it.
//!
//! Invariant: nothing counts as written before the stream below was flushed, so that its owner's
//! buffer, bounds and stall clock say what they say over a plain socket.
//! Whoever writes must, after `Pending`, offer the same bytes again, with more behind them if it
//! likes: a connection's buffer is only ever appended to.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::AsyncWrite;

/// See the module.
#[derive(Debug)]
pub(super) struct Flushed<W> {
    inner: W,
    /// Bytes that the stream has taken and that were not flushed yet.
    taken: usize,
}

impl<W> Flushed<W> {
    /// Around a stream that has nothing to flush.
    pub(super) fn new(inner: W) -> Self {
        Self { inner, taken: 0 }
    }
}

impl<W: AsyncWrite + Unpin> AsyncWrite for Flushed<W> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.taken == 0 {
            self.taken = ready!(Pin::new(&mut self.inner).poll_write(cx, buf))?;
        }
        ready!(Pin::new(&mut self.inner).poll_flush(cx))?;
        Poll::Ready(Ok(std::mem::take(&mut self.taken)))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    /// Takes everything, and gives it on when it is flushed and allowed to.
    #[derive(Default)]
    struct Lazy {
        kept: Vec<u8>,
        sent: Vec<u8>,
        open: bool,
    }

    impl AsyncWrite for Lazy {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &[u8],
        ) -> Poll<io::Result<usize>> {
            self.kept.extend(buf);
            Poll::Ready(Ok(buf.len()))
        }

        fn poll_flush(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            if !self.open {
                return Poll::Pending;
            }
            let kept = std::mem::take(&mut self.kept);
            self.sent.extend(kept);
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.poll_flush(cx)
        }
    }

    #[test]
    fn what_a_stream_keeps_is_not_written_yet_and_is_not_written_twice() {
        let mut cx = Context::from_waker(Waker::noop());
        let mut writer = Flushed::new(Lazy::default());
        assert!(Pin::new(&mut writer).poll_write(&mut cx, b"ack").is_pending());
        assert!(Pin::new(&mut writer).poll_write(&mut cx, b"ack, more").is_pending());
        writer.inner.open = true;
        let mut write = |bytes: &[u8]| match Pin::new(&mut writer).poll_write(&mut cx, bytes) {
            Poll::Ready(Ok(n)) => n,
            other => panic!("{other:?}"),
        };
        assert_eq!(write(b"ack, more"), 3);
        assert_eq!(write(b", more"), 6);
        assert_eq!(writer.inner.sent, b"ack, more");
    }
}
