//! Sockets: TCP, TLS over TCP, Unix.

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::{TcpStream, UnixStream, tcp, unix};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Where the server is and how to get in.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Target {
    /// Socket path; empty for TCP.
    pub path: String,
    /// Host name or address.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Database number.
    pub db: u32,
    /// User, for servers with ACLs.
    pub username: Option<String>,
    /// Password.
    pub password: Option<String>,
    /// Use TLS.
    pub tls: bool,
    /// File of the certificate authorities to trust; the system's if empty.
    pub tls_ca: Option<String>,
    /// File of the client's certificate.
    pub tls_cert: Option<String>,
    /// File of the client's key.
    pub tls_key: Option<String>,
    /// Name that the server's certificate must carry; the host if empty.
    pub tls_server_name: Option<String>,
    /// Do not check the server's certificate.
    pub tls_insecure: bool,
    /// Microseconds to connect within.
    pub connect_timeout: u64,
    /// Microseconds that an answer may take.
    pub request_timeout: u64,
    /// What the sentinels call the primary to go to; empty where this names the server itself.
    pub service: String,
    /// The sentinels to ask for host and port.
    pub sentinels: Vec<Target>,
    /// Nodes of a cluster, any of which says where the others are; empty where there is none.
    pub cluster: Vec<Target>,
    /// How many partitions a cluster's locks are spread over.
    pub partitions: usize,
}

impl Target {
    /// The same server, found at an address.
    #[must_use]
    pub fn at(&self, host: &str, port: u16) -> Self {
        Self {
            host: host.to_owned(),
            port,
            sentinels: Vec::new(),
            cluster: Vec::new(),
            ..self.clone()
        }
    }

    /// Whether its locks are spread over the nodes of a cluster.
    pub fn clustered(&self) -> bool {
        !self.cluster.is_empty()
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if !self.path.is_empty() {
            f.write_str(&self.path)
        } else if !self.sentinels.is_empty() {
            write!(f, "service {:?} of its sentinels", self.service)
        } else if self.clustered() {
            f.write_str("cluster")
        } else if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Target({self}, db {}, user {:?})",
            self.db, self.username
        )
    }
}

/// The reading half.
pub enum Reader {
    /// TCP.
    Tcp(tcp::OwnedReadHalf),
    /// Unix socket.
    Unix(unix::OwnedReadHalf),
    /// TLS.
    Tls(ReadHalf<TlsStream<TcpStream>>),
}

impl Reader {
    /// Reads what is there, at least one byte; 0 at the end of the stream. Cancel safe.
    pub async fn read(&mut self, into: &mut bytes::BytesMut) -> std::io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read_buf(into).await,
            Self::Unix(stream) => stream.read_buf(into).await,
            Self::Tls(stream) => stream.read_buf(into).await,
        }
    }
}

/// The writing half of a plain socket, which any thread may write to without waiting.
#[derive(Debug, Clone)]
pub enum Direct {
    /// TCP.
    Tcp(Arc<tcp::OwnedWriteHalf>),
    /// Unix socket.
    Unix(Arc<unix::OwnedWriteHalf>),
    /// What stands for a socket in tests.
    #[cfg(feature = "shuttle")]
    Double(Arc<crate::sync::doubles::Socket>),
}

impl Direct {
    /// Writes as much as the socket takes at once.
    pub fn try_write(&self, data: &[u8]) -> std::io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.try_write(data),
            Self::Unix(stream) => stream.try_write(data),
            #[cfg(feature = "shuttle")]
            Self::Double(socket) => socket.try_write(data),
        }
    }

    /// Waits until the socket takes more.
    pub async fn writable(&self) -> std::io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.writable().await,
            Self::Unix(stream) => stream.writable().await,
            #[cfg(feature = "shuttle")]
            Self::Double(_) => Ok(()),
        }
    }
}

/// The writing half.
pub enum Writer {
    /// A plain socket.
    Direct(Direct),
    /// TLS: only the engine writes.
    Tls(WriteHalf<TlsStream<TcpStream>>),
}

impl Writer {
    /// Writes all of it.
    pub async fn write_all(&mut self, mut data: &[u8]) -> std::io::Result<()> {
        match self {
            Self::Tls(stream) => {
                stream.write_all(data).await?;
                stream.flush().await
            }
            Self::Direct(direct) => {
                while !data.is_empty() {
                    match direct.try_write(data) {
                        Ok(n) => data = &data[n..],
                        Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                            direct.writable().await?;
                        }
                        Err(e) => return Err(e),
                    }
                }
                Ok(())
            }
        }
    }
}

/// Opens the socket.
pub async fn connect(target: &Target) -> Result<(Reader, Writer), String> {
    if !target.path.is_empty() {
        let stream = UnixStream::connect(&target.path)
            .await
            .map_err(|e| e.to_string())?;
        let (reader, writer) = stream.into_split();
        return Ok((
            Reader::Unix(reader),
            Writer::Direct(Direct::Unix(Arc::new(writer))),
        ));
    }
    let stream = TcpStream::connect((target.host.as_str(), target.port))
        .await
        .map_err(|e| e.to_string())?;
    stream.set_nodelay(true).map_err(|e| e.to_string())?;
    if !target.tls {
        let (reader, writer) = stream.into_split();
        return Ok((
            Reader::Tcp(reader),
            Writer::Direct(Direct::Tcp(Arc::new(writer))),
        ));
    }
    let name = target
        .tls_server_name
        .clone()
        .unwrap_or_else(|| target.host.clone());
    let server =
        ServerName::try_from(name.clone()).map_err(|e| format!("TLS server name {name:?}: {e}"))?;
    let connector = TlsConnector::from(Arc::new(tls_config(target)?));
    let stream = connector
        .connect(server, stream)
        .await
        .map_err(|e| format!("TLS: {e}"))?;
    let (reader, writer) = tokio::io::split(stream);
    Ok((Reader::Tls(reader), Writer::Tls(writer)))
}

fn tls_config(target: &Target) -> Result<rustls::ClientConfig, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|e| format!("TLS: {e}"))?;
    let builder = if target.tls_insecure {
        builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(insecure::NoCheck(provider)))
    } else {
        let mut roots = rustls::RootCertStore::empty();
        if let Some(file) = &target.tls_ca {
            for certificate in certificates(file)? {
                roots.add(certificate).map_err(|e| format!("{file}: {e}"))?;
            }
        } else {
            let found = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(found.certs);
            if roots.is_empty() {
                return Err(String::from(
                    "TLS: no certificate authorities found on this machine; name a file by tls_ca",
                ));
            }
        }
        builder.with_root_certificates(roots)
    };
    match (&target.tls_cert, &target.tls_key) {
        (Some(cert), Some(key)) => {
            let key = PrivateKeyDer::from_pem_file(key).map_err(|e| format!("{key}: {e}"))?;
            builder
                .with_client_auth_cert(certificates(cert)?, key)
                .map_err(|e| format!("TLS client certificate: {e}"))
        }
        (None, None) => Ok(builder.with_no_client_auth()),
        _ => Err(String::from(
            "TLS: a client certificate needs both tls_cert and tls_key",
        )),
    }
}

fn certificates(file: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    CertificateDer::pem_file_iter(file)
        .and_then(Iterator::collect)
        .map_err(|e| format!("{file}: {e}"))
}

mod insecure {
    //! The verifier for `tls_insecure`, which its user asked for by name.

    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
    use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    use rustls::{DigitallySignedStruct, Error, SignatureScheme};
    use std::sync::Arc;

    /// Accepts every certificate; signatures are still checked.
    #[derive(Debug)]
    pub struct NoCheck(pub Arc<CryptoProvider>);

    impl ServerCertVerifier for NoCheck {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            verify_tls12_signature(
                message,
                cert,
                dss,
                &self.0.signature_verification_algorithms,
            )
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            verify_tls13_signature(
                message,
                cert,
                dss,
                &self.0.signature_verification_algorithms,
            )
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.0.signature_verification_algorithms.supported_schemes()
        }
    }
}
