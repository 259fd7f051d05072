//! A real browser, driven through the DevTools protocol.

use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use tungstenite::{Message, WebSocket};

/// Command names of browsers with this protocol; `CHROME` names another.
const NAMES: [&str; 8] = [
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "microsoft-edge",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
];
const PATIENCE: Duration = Duration::from_secs(60);

/// A headless browser with one page.
pub struct Browser {
    process: Child,
    socket: WebSocket<TcpStream>,
    session: String,
    calls: u64,
    /// The console output and exceptions of the page.
    pub complaints: Vec<String>,
    /// The network requests of the page.
    pub requests: Vec<String>,
    _profile: tempfile::TempDir,
}

fn start(profile: &Path) -> Child {
    let named = std::env::var("CHROME").ok();
    for name in named.as_deref().into_iter().chain(NAMES) {
        let process = Command::new(name)
            .args(["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions"])
            .args(["--disable-dev-shm-usage", "--disable-background-networking", "--remote-debugging-port=0"])
            .arg(format!("--user-data-dir={}", profile.display()))
            .arg("about:blank")
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        match process {
            Ok(process) => return process,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => panic!("{name} does not start: {error}"),
        }
    }
    panic!(
        "no browser to try the page in: install Chromium (apt-get install chromium, dnf install chromium) or Chrome, \
         or name one in the variable CHROME"
    );
}

impl Browser {
    /// Opens `page` in a window of `width` × `height`.
    pub fn open(page: &Path, width: u32, height: u32) -> Browser {
        let profile = tempfile::tempdir().expect("a temporary folder");
        let mut process = start(profile.path());
        // The browser prints its address on stderr, among other things.
        let (send, lines) = std::sync::mpsc::channel();
        let stderr = BufReader::new(process.stderr.take().expect("piped"));
        std::thread::spawn(move || {
            // Read to the end, because a full pipe would block the browser.
            for line in stderr.lines().map_while(Result::ok) {
                let _ = send.send(line);
            }
        });
        let mut said = Vec::new();
        let address = loop {
            match lines.recv_timeout(PATIENCE) {
                Ok(line) => match line.strip_prefix("DevTools listening on ") {
                    Some(address) => break address.trim().to_string(),
                    None => said.push(line),
                },
                Err(_) => {
                    let _ = process.kill();
                    panic!("the browser does not listen:\n{}", said.join("\n"));
                }
            }
        };
        let host = address.trim_start_matches("ws://").split('/').next().expect("an address");
        let stream = TcpStream::connect(host).expect("the browser listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a time");
        let (socket, _) = tungstenite::client(address.as_str(), stream).expect("a DevTools socket");
        let mut browser = Browser {
            process,
            socket,
            session: String::new(),
            calls: 0,
            complaints: Vec::new(),
            requests: Vec::new(),
            _profile: profile,
        };
        let target = browser.call("Target.createTarget", json!({ "url": "about:blank" }));
        let attached =
            browser.call("Target.attachToTarget", json!({ "targetId": target["targetId"], "flatten": true }));
        browser.session = attached["sessionId"].as_str().expect("a session").to_string();
        for domain in ["Page", "Runtime", "Log", "Network"] {
            browser.call(&format!("{domain}.enable"), json!({}));
        }
        let screen = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        browser.call("Emulation.setDeviceMetricsOverride", screen);
        // A drive letter needs a slash before it.
        let path = page.display().to_string().replace('\\', "/");
        let url = format!("file:///{}", path.trim_start_matches('/'));
        browser.call("Page.navigate", json!({ "url": url }));
        browser.wait("document.readyState === 'complete' && location.protocol === 'file:'");
        browser
    }

    fn call(&mut self, method: &str, params: Value) -> Value {
        self.calls += 1;
        let mut message = json!({ "id": self.calls, "method": method, "params": params });
        if !self.session.is_empty() {
            message["sessionId"] = self.session.clone().into();
        }
        self.socket.send(Message::text(message.to_string())).expect("the browser listens");
        loop {
            let reply = match self.socket.read().expect("the browser answers") {
                Message::Text(text) => serde_json::from_str::<Value>(&text).expect("JSON"),
                _ => continue,
            };
            match reply["method"].as_str() {
                Some("Runtime.exceptionThrown" | "Runtime.consoleAPICalled" | "Log.entryAdded") => {
                    self.complaints.push(reply["params"].to_string());
                }
                Some("Network.requestWillBeSent") => {
                    self.requests.push(reply["params"]["request"]["url"].as_str().unwrap_or_default().to_string());
                }
                _ => {}
            }
            if reply["id"] == self.calls {
                assert!(reply["error"].is_null(), "{method}: {}", reply["error"]);
                return reply["result"].clone();
            }
        }
    }

    /// The value of a JavaScript expression.
    #[track_caller]
    pub fn value(&mut self, expression: &str) -> Value {
        let result = self.call("Runtime.evaluate", json!({ "expression": expression, "returnByValue": true }));
        assert!(result["exceptionDetails"].is_null(), "{expression}: {}", result["exceptionDetails"]);
        result["result"]["value"].clone()
    }
    #[track_caller]
    pub fn text(&mut self, expression: &str) -> String {
        let value = self.value(expression);
        value.as_str().unwrap_or_else(|| panic!("{expression} is {value}")).to_string()
    }

    /// Waits until a JavaScript expression is true.
    #[track_caller]
    pub fn wait(&mut self, expression: &str) {
        let start = std::time::Instant::now();
        while self.value(expression) != true {
            assert!(start.elapsed() < PATIENCE, "{expression} never was true");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The middle of an element, scrolled into view.
    #[track_caller]
    fn middle(&mut self, element: &str) -> (f64, f64) {
        let place = self.value(&format!(
            "(() => {{ const e = {element}; e.scrollIntoView({{ block: 'center' }}); \
             const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; }})()"
        ));
        (place[0].as_f64().expect("a place"), place[1].as_f64().expect("a place"))
    }

    fn mouse(&mut self, kind: &str, (x, y): (f64, f64), button: &str) {
        let event = json!({ "type": kind, "x": x, "y": y, "button": button, "clickCount": u8::from(button == "left") });
        self.call("Input.dispatchMouseEvent", event);
    }

    /// Moves the mouse onto an element.
    #[track_caller]
    pub fn hover(&mut self, element: &str) {
        let at = self.middle(element);
        self.mouse("mouseMoved", at, "none");
    }
    #[track_caller]
    pub fn click(&mut self, element: &str) {
        let at = self.middle(element);
        self.mouse("mouseMoved", at, "none");
        self.mouse("mousePressed", at, "left");
        self.mouse("mouseReleased", at, "left");
    }
    /// Emulates a touch screen without a mouse.
    #[track_caller]
    pub fn tap(&mut self, element: &str) {
        self.call("Emulation.setTouchEmulationEnabled", json!({ "enabled": true }));
        let (x, y) = self.middle(element);
        self.call("Input.dispatchTouchEvent", json!({ "type": "touchStart", "touchPoints": [{ "x": x, "y": y }] }));
        self.call("Input.dispatchTouchEvent", json!({ "type": "touchEnd", "touchPoints": [] }));
    }
    pub fn key(&mut self, key: &str, code: u32) {
        for kind in ["rawKeyDown", "keyUp"] {
            let event = json!({ "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code });
            self.call("Input.dispatchKeyEvent", event);
        }
    }
    pub fn dark(&mut self) {
        let feature = json!([{ "name": "prefers-color-scheme", "value": "dark" }]);
        self.call("Emulation.setEmulatedMedia", json!({ "features": feature }));
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // When asked to close, the browser ends all its processes. If it were killed, some would still write to the
        // folder that is now removed.
        let close = json!({ "id": 0, "method": "Browser.close" });
        let _ = self.socket.send(Message::text(close.to_string()));
        for _ in 0..100 {
            if !matches!(self.process.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
