// The search of the site runs in a worker, and browsers allow none on pages that are opened from a folder.
// There, a hidden frame takes the worker's place: it runs the same script and passes messages on.
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.documentElement.append(frame)
      this.inside = frame.contentWindow
      const toPage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      const page = this.inside.document
      page.open() // else Firefox may replace the empty page later
      page.write("<!doctype html><head></head>")
      page.close()
      const load = (source) => new Promise((resolve, reject) => {
        const script = page.createElement("script")
        script.onload = resolve
        script.onerror = reject
        script.src = source
        page.head.append(script)
      })
      this.inside.postMessage = toPage
      this.inside.importScripts = async (...sources) => {
        for (const source of sources) await load(source)
      }
      this.ready = load(url)
      this.ready.catch(() => this.dispatchEvent(new Event("error")))
    }

    postMessage(data) {
      const passOn = () => this.inside.dispatchEvent(new MessageEvent("message", { data }))
      this.ready.then(passOn, () => {})
    }

    terminate() {
      this.inside.frameElement.remove()
    }
  }
  window.Worker = window.IFrameWorker
}
