// A text or a conversation with its look inside as one file, which needs no server.

const part = async (name) => (await fetch(name)).text();

/** The page of a record, whose script and style are in it, and whose texts are nothing but data. */
export async function pageOf(record) {
  const [page, style, look] = await Promise.all(['shared.html', 'page.css', 'look.js'].map(part));
  const nonce = [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16)).join('');
  const own = {
    nonce,
    title: new Option(record.title).innerHTML,
    style,
    record: JSON.stringify(record).replaceAll('<', '\\u003c'),
    script: look.replaceAll(/^export /gm, ''),
  };
  return page.replaceAll(/\{(nonce|title|style|record|script)\}/g, (_, name) => own[name]);
}

/** Have the browser save a record's page. */
export async function save(record) {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([await pageOf(record)], { type: 'text/html' }));
  link.download = 'softmeet.html';
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
